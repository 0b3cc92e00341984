"""The fields of each request, and what they may hold. Unknown ones are refused."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from ..pipelines.cogview.settings import SamplingSettings as CogViewSamplingSettings
from ..pipelines.cogview2.settings import CaptionSettings, SamplingSettings
from ..pipelines.common.settings import Setting
from .errors import ApiError, bad_request

IGNORED = "Taken for compatibility, and ignored."
LARGEST_SEED = 2**62  # the pictures of a request have seeds from the first one on, and all must fit into 63 bits


def _check_text(text: str) -> str:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must be Unicode text without the character NUL")
    return text


def _check_not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty; say what the picture shows")
    return text


def _check_whole(stream: bool) -> bool:
    if stream:
        raise ValueError("must be false; answers come whole")
    return stream


Text = Annotated[str, AfterValidator(_check_text)]
Prompt = Annotated[Text, AfterValidator(_check_not_blank)]
Language = Literal["en", "zh"]


class Request(BaseModel):
    """What every request may have."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = Field(None, description="One of `GET /v1/models`; there is only one.")
    user: Text | None = Field(None, max_length=256, description=IGNORED)


class TakenForOthers(BaseModel):
    """
    What clients of other servers send whatever they talk to. It is taken where it asks for nothing that this server
    cannot do; so is `null`, for every field.
    """

    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = Field(None, description=IGNORED)
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description=IGNORED)
    input_fidelity: Literal["low", "high"] | None = Field(None, description=IGNORED)
    output_format: Literal["png", "jpeg", "webp"] = Field("png", description="Kind of the files.")
    output_compression: int = Field(100, ge=0, le=100, description="Quality of JPEG and WebP files; 100 is best.")
    stream: Annotated[bool, AfterValidator(_check_whole)] | None = Field(None, description="Answers come whole.")
    partial_images: int | None = Field(None, ge=0, le=3, description=IGNORED)


def _field(setting: Setting, default: Any = None) -> tuple[Any, Any]:
    """The type and the field of a setting, with its bounds and help."""
    kind = int if setting.is_whole else float
    field = Field(
        default,
        ge=setting.least,
        le=setting.most,
        allow_inf_nan=None if setting.is_whole else False,
        description=setting.help,
    )
    return kind if default is not None else kind | None, field


def _fields(pipeline: str) -> dict[str, Any]:
    """The fields for the settings that a pipeline takes, and those that only CogView has."""
    only_cogview = {
        name: _field(setting)
        for name, setting in CogViewSamplingSettings.declared().items()
        if name not in SamplingSettings.declared()
    }
    return {name: _field(setting) for name, setting in SamplingSettings.declared(pipeline).items()} | only_cogview


class _MakesPictures(Request, TakenForOthers):
    seed: int | None = Field(
        None,
        ge=-1,
        le=LARGEST_SEED,
        description="Of the first picture; picture i has seed + i. By default, and for -1, random.",
    )
    response_format: Literal["b64_json"] = Field("b64_json", description="Pictures are always part of the answer.")
    style: Text | None = Field(
        None,
        description="A style preset of the model. `vivid` and `natural` are ignored if it has no such styles.",
    )

    def settings(self) -> dict[str, Any]:
        """Style and settings of sampling that were given, as the pipelines call them."""
        names = ("style", "negative_prompt", *SamplingSettings.declared(), *CogViewSamplingSettings.declared())
        given = {name: getattr(self, name, None) for name in names}
        return {name: value for name, value in given.items() if value is not None}


if TYPE_CHECKING:  # which sees no fields but those of the base
    MakesPictures = _MakesPictures
else:
    MakesPictures = create_model(
        "MakesPictures",
        __base__=_MakesPictures,
        __doc__="What every request for pictures may have.",
        **_fields("CogView2UpscalePipeline"),
    )


class _DrawsTokens(MakesPictures):
    prompt: Prompt
    n: int = Field(1, ge=1, description="Pictures.")
    negative_prompt: Text | None = None


if TYPE_CHECKING:
    DrawsTokens = _DrawsTokens
else:
    DrawsTokens = create_model(
        "DrawsTokens",
        __base__=_DrawsTokens,
        __doc__="What a request may have whose low-resolution tokens are drawn.",
        **_fields("CogView2Pipeline"),
    )


class GenerationRequest(DrawsTokens):
    """`POST /v1/images/generations`, JSON."""

    size: str = Field("auto", description="WIDTHxHEIGHT, one of the model's sizes; `auto` is the largest.")
    num_candidates: int | None = Field(
        None,
        ge=1,
        description="How many to draft at low resolution; only the `n` that fit the prompt best are finished.",
    )


class EditRequest(DrawsTokens):
    """`POST /v1/images/edits`, a form with the files `image` and `mask`."""

    size: str = Field("auto", description="WIDTHxHEIGHT of the picture and of its results, or `auto`.")


class UpscaleRequest(MakesPictures):
    """`POST /v1/images/upscales`, a form with the file `image`."""

    prompt: Text = Field("", description="What the picture shows; may be left out.")
    num_levels: int = Field(
        1, ge=1, le=4, description="How many times to enlarge; each level enlarges the result of the one before."
    )


class _WritesCaptions(Request):
    language: Language = "en"
    n: int = Field(1, ge=1, description="Captions of each picture.")
    strategy: Literal["greedy", "sample", "beam", "best_of"] = "greedy"
    num_candidates: int = Field(8, ge=1, description="For `best_of`.")
    seed: int | None = Field(None, ge=-1, le=LARGEST_SEED)


if TYPE_CHECKING:

    class CaptionRequest(_WritesCaptions):
        temperature: float

else:
    CaptionRequest = create_model(
        "CaptionRequest",
        __base__=_WritesCaptions,
        __doc__="`POST /v1/images/captions`, a form with one or more files `image`.",
        temperature=_field(CaptionSettings.declared()["temperature"], CaptionSettings.temperature),
    )


class ScoreRequest(Request):
    """`POST /v1/images/scores`, a form with the file `image` and one or more fields `prompt`."""

    prompt: list[Prompt] = Field(min_length=1)


TEXTS = ("prompt", "negative_prompt", "user")


def parse(kind: type[BaseModel], values: dict, strict: bool) -> Any:
    """
    A request from its fields.

    Args:
        kind: One of the above.
        values (`dict`): By name.
        strict (`bool`): Take no text for a number: JSON has both, a form has only text. In a form an empty text, and
            `null`, stand for a field that is left out, except where it is a text of its own.

    Raises:
        ApiError: What is wrong with the first bad field. It never repeats what came.
    """
    absent = (None,) if strict else (None, "", "null")
    fields = kind.model_fields
    given = {
        name: value
        for name, value in values.items()
        if name not in fields or not (value is None if name in TEXTS else value in absent)
    }
    try:
        return kind.model_validate(given, strict=strict)
    except ValidationError as error:
        raise _explain(error, kind) from None


def _explain(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if param is not None and first["type"] == "extra_forbidden":
        known = ", ".join(sorted(kind.model_fields))
        return bad_request(f"There is no field `{param[:60]}`. Known: {known}.", param[:60], "unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"`{param}` must be given.", param, "missing_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(f"`{param}`: {message}.", param)
