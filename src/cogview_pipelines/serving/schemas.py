"""The fields of each request, and what they may hold. Unknown ones are refused."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..pipelines.cogview2.base import DEFAULT_SETTINGS
from .errors import ApiError, bad_request

LARGEST_SEED = 2**62  # the pictures of a request have seeds from the first one on, and all must fit into 63 bits


def _check_text(text: str) -> str:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must be Unicode text without the character NUL")
    return text


def _check_not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty; say what the picture shows")
    return text


# Wide enough for anything sensible, and narrow enough that no sum or quotient overflows.
Number = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Text = Annotated[str, AfterValidator(_check_text)]
Prompt = Annotated[Text, AfterValidator(_check_not_blank)]
Language = Literal["en", "zh"]


class Request(BaseModel):
    """What every request may have."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = Field(None, description="One of `GET /v1/models`; there is only one.")


class MakesPictures(Request):
    """What every request for pictures may have."""

    seed: int | None = Field(
        None, ge=0, le=LARGEST_SEED, description="Of the first picture; picture i has seed + i. By default by chance."
    )
    response_format: Literal["b64_json"] = Field("b64_json", description="Pictures are always part of the answer.")
    style: Text | None = Field(None, description="A style preset of the model.")
    direct_sr_temperature: Temperature | None = None
    direct_sr_top_k_clusters: Count | None = None
    direct_sr_cluster_temperature: Temperature | None = None
    iterative_sr_temperature: Temperature | None = None
    iterative_sr_top_k: Count | None = None
    num_lopar_steps: int | None = Field(None, ge=0, le=1000)

    def settings(self) -> dict[str, Any]:
        """Style and settings of sampling that were given, as the pipelines call them."""
        given = {name: getattr(self, name, None) for name in ("style", "negative_prompt", *DEFAULT_SETTINGS)}
        return {name: value for name, value in given.items() if value is not None}


class DrawsTokens(MakesPictures):
    """What a request may have whose low-resolution tokens are drawn."""

    prompt: Prompt
    n: int = Field(1, ge=1, description="Pictures.")
    user: Text | None = Field(None, max_length=256, description="Taken for compatibility, and ignored.")
    negative_prompt: Text | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    text_attention_bias: Number | None = None
    temperature: Temperature | None = None
    top_k_clusters: Count | None = None
    cluster_temperature: Temperature | None = None


class GenerationRequest(DrawsTokens):
    """`POST /v1/images/generations`, JSON."""

    size: str = Field("auto", description="WIDTHxHEIGHT, one of the model's sizes; `auto` is the largest.")
    num_candidates: int | None = Field(
        None, ge=1, description="Draft so many at low resolution, and finish only the `n` that fit the prompt best."
    )


class EditRequest(DrawsTokens):
    """`POST /v1/images/edits`, a form with the files `image` and `mask`."""

    size: str = Field("auto", description="WIDTHxHEIGHT of the picture, which its results have, too; or `auto`.")


class UpscaleRequest(MakesPictures):
    """`POST /v1/images/upscales`, a form with the file `image`."""

    prompt: Text = Field("", description="What the picture shows; may be left out.")
    num_levels: int = Field(1, ge=1, le=4, description="Enlarge again what came out, so many times in all.")


class CaptionRequest(Request):
    """`POST /v1/images/captions`, a form with one or more files `image`."""

    language: Language = "en"
    n: int = Field(1, ge=1, description="Captions of each picture.")
    strategy: Literal["greedy", "sample", "beam", "best_of"] = "greedy"
    num_candidates: int = Field(8, ge=1, description="For `best_of`.")
    temperature: Temperature = 1.0
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED)


class ScoreRequest(Request):
    """`POST /v1/images/scores`, a form with the file `image` and one or more fields `prompt`."""

    prompt: list[Prompt] = Field(min_length=1)


def parse(kind: type[BaseModel], values: dict, strict: bool) -> Any:
    """
    A request from its fields.

    Args:
        kind: One of the above.
        values (`dict`): By name.
        strict (`bool`): Take no text for a number: JSON has both, a form has only text.

    Raises:
        ApiError: What is wrong with the first bad field. It never repeats what came.
    """
    try:
        return kind.model_validate(values, strict=strict)
    except ValidationError as error:
        raise _explain(error, kind) from None


def _explain(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(kind.model_fields))
        return bad_request(f"There is no field `{param[:60]}`. Known: {known}.", param[:60], "unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"`{param}` must be given.", param, "missing_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(f"`{param}`: {message}.", param)
