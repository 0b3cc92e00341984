"""What the pipelines of CogView share: components, texts, pictures, and how well a caption fits."""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizer

from ...generation.batching import run_in_batches
from ...generation.sampling import sample_tokens
from ...generation.tokens import Sampler
from ...models.cogview import sequences
from ...models.cogview.modeling_cogview import CogViewModel
from ...models.image_tokenizers.auto import choose_rate
from ...pictures.pixels import Images, Picture, read_pictures
from ...pictures.sizes import center_crop, resize_shorter_side
from ..common.arguments import quote
from ..common.base import PipelineBase
from .outputs import CogViewPreviewOutput
from .settings import CaptionSettings, SamplingSettings, UpscaleSettings

# The model reads all of its weights for each token, whatever the number of pictures.
MOST_SEQUENCES = 32
# Copies of the states of new tokens that live at the peak.
STATES = 12
SETTINGS = {
    "CogViewPipeline": SamplingSettings,
    "CogViewUpscalePipeline": UpscaleSettings,
    "CogViewCaptionPipeline": CaptionSettings,
}
STAGES = {
    "transformer": "CogViewPipeline makes pictures with it",
    "super_resolution_transformer": "CogViewUpscalePipeline makes finer pictures with it",
    "caption_transformer": "CogViewCaptionPipeline describes pictures with it",
}


class CogViewPipelineBase(PipelineBase):
    """Components of the pipelines; [`CogViewPipeline`] describes the arguments."""

    _preview_output = CogViewPreviewOutput
    model_cpu_offload_seq = "transformer->super_resolution_transformer->caption_transformer"
    _optional_components = [*STAGES]  # noqa: RUF012 - diffusers adds lists to it
    # What this pipeline cannot do without: any one of these.
    _needed: tuple[str, ...] = ()

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        vqvae: PreTrainedModel,
        transformer: PreTrainedModel | None = None,
        caption_transformer: PreTrainedModel | None = None,
        super_resolution_transformer: PreTrainedModel | None = None,
        compression_rate: int | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        super().__init__()
        given = {
            "transformer": transformer,
            "caption_transformer": caption_transformer,
            "super_resolution_transformer": super_resolution_transformer,
        }
        self._check_components(tokenizer, vqvae, given)
        self.register_modules(tokenizer=tokenizer, vqvae=vqvae, **given)
        self.register_to_config(
            compression_rate=choose_rate(vqvae, compression_rate), settings=_check_settings(settings)
        )

    @classmethod
    def check_needed(cls, there: Collection[str]) -> None:
        """
        See that one of the models that this pipeline works with is there.

        Args:
            there (collection of `str`): Names of components.

        Raises:
            ValueError: If none is; the message says what those that are there are good for.
        """
        if any(name in there for name in cls._needed):
            return
        hints = "; ".join(f"`{name}` is there: {use}" for name, use in STAGES.items() if name in there)
        raise ValueError(
            f"`{cls._needed[0]}` must be given for a {cls.__name__}, but is missing." + (f" {hints}." if hints else "")
        )

    def _check_components(self, tokenizer, vqvae, given: dict) -> None:
        self.check_needed([name for name, model in given.items() if model is not None])
        for name, model in given.items():
            if model is None:
                continue
            if not isinstance(model, CogViewModel):
                raise ValueError(
                    f"`{name}` must be a CogViewModel, but is a {type(model).__name__}: another model family has "
                    "pipelines of its own."
                )
            config = model.config
            if tokenizer is not None and tokenizer.command_token_id != config.command_token_id:
                raise ValueError(
                    f"`tokenizer` has its first command token at {tokenizer.command_token_id}, but `{name}` at "
                    f"{config.command_token_id}. They belong to different models."
                )
            if vqvae is not None and vqvae.config.num_embeddings != config.num_image_tokens:
                raise ValueError(
                    f"`vqvae` has {vqvae.config.num_embeddings} codes, but `{name}` {config.num_image_tokens}. They "
                    "belong to different models."
                )

    @property
    def _model(self) -> str:
        """Name of the component that this pipeline works with."""
        return next(name for name in self._needed if getattr(self, name) is not None)

    @property
    def caption_component(self) -> str:
        """Name of the component that writes captions, and reads those that are scored."""
        return "transformer" if self.caption_transformer is None else "caption_transformer"

    @property
    def layout(self) -> sequences.SequenceLayout:
        """Where things stand in the sequences of the model."""
        return getattr(self, self._model).config.layout

    def _memory_per_picture(self, model: PreTrainedModel) -> tuple[int, int]:
        config = model.config
        # the prompt's part is there twice while it is handed out to its pictures
        length = config.longest_sequence + config.max_text_tokens + 3
        cache = 2 * config.num_hidden_layers * length * config.hidden_size
        states = STATES * config.hidden_size + 2 * config.intermediate_size
        return (cache + states) * model.dtype.itemsize, MOST_SEQUENCES

    # Arguments -------------------------------------------------------------------------------------------------------

    @property
    def _preset(self) -> dict[str, Any]:
        """The settings that this model wants in the calls of this pipeline, in place of the released ones."""
        return dict(self.config.settings.get(type(self).__name__, {}))

    def _sampler(self, settings: SamplingSettings | CaptionSettings | UpscaleSettings) -> Sampler:
        return functools.partial(
            sample_tokens, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
        )

    def _encode_prompts(self, prompts: list[str], longest: int, scored: bool = False) -> list[list[int]]:
        """
        Token ids of each prompt; names of command tokens in it are letters. Words that the model does not know are
        left out, unless the prompts are `scored`.
        """
        texts = []
        for prompt in prompts:
            text = self.tokenizer.encode(prompt if scored else self.tokenizer.known_text(prompt))
            if prompt.strip() and not text:
                raise ValueError(f"`prompt` must not be empty, but {prompt!r} has no visible character.")
            if len(text) > longest:
                raise ValueError(
                    f"`prompt` may have {longest} tokens with this model, but {quote(prompt)} has {len(text)}. "
                    "Shorten it."
                )
            texts.append(text)
        self._require_embeddings(texts, "`prompt`")
        self._tell_unknown(prompts, scored=scored)
        return texts

    def _read_images(self, images: Images, size: tuple[int, int]) -> torch.Tensor:
        """The middle of each picture at this height and width in pixels: `(num_images, 3, height, width)`."""
        return torch.stack([_fit(picture, size) for picture in read_pictures(images)])

    # Captions --------------------------------------------------------------------------------------------------------

    def _caption_scores(
        self,
        model_name: str,
        tokens: torch.Tensor,
        texts: Sequence[Sequence[int]],
        batch_size: int,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """
        Log-probability of each text given the tokens of its picture, in nats, per token or in sum: `(num_pairs,)`.

        Image codes are out of the question where text is due: the rest of the vocabulary shares the probability.
        """
        model = getattr(self, model_name)
        device, layout = self._device_of(model), model.config.layout
        scores = torch.empty(len(texts))
        # texts of like length together, so that little is computed for padding
        order = sorted(range(len(texts)), key=lambda pair: len(texts[pair]))

        def score(batch: slice) -> None:
            pairs = order[batch]
            sequence = sequences.caption(tokens[pairs].cpu().flatten(1), layout, [texts[pair] for pair in pairs])
            sequence = sequence.to(device)
            labels = sequence.labels
            assert labels is not None
            first = int((labels >= 0).any(0).nonzero()[0, 0])
            logits = model(
                sequence.input_ids,
                sequence.position_ids,
                sequence.attention_mask,
                logits_positions=torch.arange(first, labels.shape[1], device=device),
                full_vocabulary=True,
            ).logits
            logits = logits[..., layout.num_image_tokens :].log_softmax(-1)
            labels = labels[:, first:]
            chosen = logits.gather(-1, (labels - layout.num_image_tokens).clamp(min=0)[..., None])[..., 0]
            total = (chosen * (labels >= 0)).sum(1)
            scores[pairs] = (total / (labels >= 0).sum(1) if reduction == "mean" else total).cpu()

        run_in_batches(score, len(order), batch_size)
        return scores


def _fit(picture: Picture, size: tuple[int, int]) -> torch.Tensor:
    """A picture as the release reads it: bytes, the shorter side resized, the middle cut out."""
    height, width = size
    pixels = (picture.on_white() * 255).round().clamp(0, 255).to(torch.uint8)
    if height == width:
        pixels = center_crop(resize_shorter_side(pixels, height, as_pillow=True), height)
    else:
        pixels = torch.nn.functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
    return pixels.float() / 255


def _check_settings(settings: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """What a model brings in place of the released settings, by pipeline, if the pipelines have such settings."""
    settings = {} if settings is None else settings
    checked = {}
    for pipeline, own in settings.items() if isinstance(settings, Mapping) else [(settings, None)]:
        if pipeline not in SETTINGS or not isinstance(own, Mapping):
            raise ValueError(f"`settings` must have settings by name for {list(SETTINGS)}, but is {settings!r}.")
        unknown = sorted(set(own) - set(SETTINGS[pipeline].declared()))
        if unknown:
            known = list(SETTINGS[pipeline].declared())
            raise ValueError(f"`settings` must have some of {known} for {pipeline}, but has {unknown}.")
        SETTINGS[pipeline](**own)
        checked[pipeline] = dict(own)
    return checked
