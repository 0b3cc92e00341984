"""Captions of pictures, and how well captions fit."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizer

from ...evaluation.likelihood import caption_losses, image_losses
from ...generation.batching import run_in_batches, slices
from ...generation.sampling import Generators, sample_tokens
from ...generation.texts import WrittenText, search_texts, write_texts
from ...models.cogview2 import sequences
from ...models.image_tokenizers.auto import choose_rate
from ...pictures.pixels import Images, Picture, read_pictures
from ...pictures.sizes import center_crop, resize
from ..common.arguments import (
    check_choice,
    check_counts,
    check_numbers_drawn,
    check_prompts,
    check_tokens,
    one_generator_per_image,
    quote,
)
from ..common.base import PipelineBase
from ..common.calls import Call, inference
from .base import CogView2PipelineBase
from .outputs import CogView2CaptionPipelineOutput
from .settings import CaptionSettings

LANGUAGES = ("en", "zh")
STRATEGIES = ("greedy", "sample", "beam", "best_of")
ENDS = ("sentence", "likelihood", "length")
RANKINGS = ("image", "caption")
DEFAULT_MAX_LENGTH = 48
DEFAULT_MAX_BATCH_SIZE = 16


@dataclass(frozen=True)
class _Request:
    """How a call describes pictures; the names are those of its arguments."""

    language: str
    strategy: str
    num_kept: int
    num_drawn: int  # of each picture; 0 where nothing is drawn
    num_beams: int
    rank_by: str
    settings: CaptionSettings
    max_length: int
    end: str
    batch_size: int

    @property
    def num_texts(self) -> int:
        """Texts of a picture that are computed at a time."""
        return max(self.num_drawn, self.num_beams if self.strategy == "beam" else 1)


@dataclass(frozen=True)
class _Caption:
    text: str
    score: float
    token_ids: list[int]
    seed: int | None


class CogView2CaptionPipeline(PipelineBase):
    """
    Captions of pictures in English and Chinese, and the loss of given captions, by CogLM.

    CogLM reads all low-resolution tokens of the picture and a start token that says the language, and writes the text
    from left to right. Only pieces of that language and common ones (punctuation, digits) can be written.

    Training shows no end token, so the end has to be found: see `end` of `__call__`.

    Args:
        tokenizer ([`IcetkTokenizer`]): Ids to text.
        transformer ([`CogLMModel`]): CogLM.
        vqvae ([`IcetkVQModel`]): Pixels to tokens.
        compression_rate (`int`, *optional*): Pixels per token along each side, one of the rates of `vqvae`; by default
            its only one, or 8.

    `from_pipe` takes these from any other pipeline of this package. Source: https://arxiv.org/abs/2204.14217.
    """

    _made_for = "captioning"
    model_cpu_offload_seq = "transformer"
    _passed_over = frozenset(inspect.signature(CogView2PipelineBase.__init__).parameters)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        transformer: PreTrainedModel,
        vqvae: PreTrainedModel,
        compression_rate: int | None = None,
    ):
        super().__init__()
        self.register_modules(tokenizer=tokenizer, transformer=transformer, vqvae=vqvae)
        self.register_to_config(compression_rate=choose_rate(vqvae, compression_rate))

    @property
    def layout(self) -> sequences.SequenceLayout:
        """Where things stand in the transformer's sequences."""
        return self.transformer.config.layout

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of what CogLM sees."""
        rows, columns = self.transformer.config.image_grid
        return [(rows * self.config.compression_rate, columns * self.config.compression_rate)]

    @inference
    def __call__(
        self,
        image: Images | None = None,
        *,
        tokens: torch.Tensor | None = None,
        language: str = "en",
        strategy: str = "greedy",
        num_captions_per_image: int = 1,
        num_candidates: int = 8,
        num_beams: int = 4,
        rank_by: str = "image",
        temperature: float = 1.0,
        top_k: int | None = None,
        max_length: int | None = None,
        end: str = "sentence",
        generator: Generators = None,
        max_batch_size: int | None = None,
        return_dict: bool = True,
        return_statistics: bool = False,
    ) -> CogView2CaptionPipelineOutput | tuple:
        """
        Write captions.

        Args:
            image (PIL image, array, tensor, or list of them):
                Pictures of any size, of which the square in the middle is seen; arrays `(height, width, 3)` and
                tensors `(3, height, width)` of bytes, or of floats in [0, 1]. Or give `tokens`.
            tokens (`torch.Tensor` of shape `(num_images, rows, columns)`, *optional*): Low-resolution tokens instead.
            language (`str`): `"en"` or `"zh"`.
            strategy (`str`): `"greedy"`: always the most likely token; `"sample"`: draw; `"beam"`: beam search for the
                text of the highest mean log-probability; `"best_of"`: draw `num_candidates` and keep the best.
            num_captions_per_image (`int`): They come picture by picture, best first (as drawn, with `"sample"`).
            num_candidates (`int`, defaults to 8), num_beams (`int`, defaults to 4): For `"best_of"` and for `"beam"`.
            rank_by (`str`): What is best of `num_candidates`: `"image"`: the text that makes the picture's tokens
                most likely, as in text to image; `"caption"`: that with the highest mean log-probability.
            temperature (`float`), top_k (`int`, *optional*): Of `"sample"` and `"best_of"`.
            max_length (`int`, *optional*): The most tokens; default 48, or what the model takes if that is less.
            end (`str`):
                Where a caption ends. `"sentence"`: at the first full stop, question or exclamation mark; one without
                any is cut as with `"likelihood"`. `"likelihood"`: after `max_length` tokens are written, at the word
                after which the text makes the picture's tokens most likely. `"length"`: at `max_length`, always.
                A full stop is not part of the caption.
            generator (`torch.Generator` or list of them, *optional*): One for all, or one per drawn text.
            max_batch_size (`int`, defaults to 16): Texts that are computed at a time; fewer once memory runs out. It
                changes memory and speed only.
            return_dict (`bool`): Return a [`CogView2CaptionPipelineOutput`] rather than a tuple. Its `scores` are what
                ranked the captions, else their mean log-probabilities.
            return_statistics (`bool`): As for [`CogView2Pipeline`].

        Raises:
            TypeError: If a picture is none.
            ValueError: If an argument cannot be used; the message says which and why.
        """
        settings = CaptionSettings.choose({}, locals())
        for name, value, possible in (
            ("language", language, LANGUAGES),
            ("strategy", strategy, STRATEGIES),
            ("rank_by", rank_by, RANKINGS),
            ("end", end, ENDS),
        ):
            check_choice(name, value, possible)
        num_kept, num_candidates, num_beams = check_numbers_drawn(
            1, num_captions_per_image=num_captions_per_image, num_candidates=num_candidates, num_beams=num_beams
        )
        max_length, max_batch_size = check_counts(max_length=max_length, max_batch_size=max_batch_size)
        most = {"greedy": 1, "beam": num_beams, "best_of": num_candidates}.get(strategy, num_kept)
        if num_kept > most:
            raise ValueError(
                f"`num_captions_per_image` may be {most} with `strategy={strategy!r}`, but is {num_kept}."
            )
        longest = self.transformer.config.max_text_tokens
        max_length = min(DEFAULT_MAX_LENGTH, longest) if max_length is None else max_length
        if max_length > longest:
            raise ValueError(f"`max_length` may be {longest} with this model, but is {max_length}.")
        request = _Request(
            language=language,
            strategy=strategy,
            num_kept=num_kept,
            num_drawn={"sample": num_kept, "best_of": num_candidates}.get(strategy, 0),
            num_beams=num_beams,
            rank_by=rank_by,
            settings=settings,
            max_length=max_length,
            end=end,
            batch_size=max_batch_size or DEFAULT_MAX_BATCH_SIZE,
        )
        with self._running(total=0, return_statistics=return_statistics) as call:
            tokens = self._low_tokens(image, tokens, request.batch_size, call)
            call.expect(len(tokens))
            check_numbers_drawn(len(tokens), num_candidates=request.num_drawn or None)
            generators = (
                one_generator_per_image(generator, len(tokens) * request.num_drawn) if request.num_drawn else []
            )
            with call.measure("transformer"):
                captions = self._captions(request, call, tokens, generators)
        output = CogView2CaptionPipelineOutput(
            captions=[caption.text for caption in captions],
            scores=[caption.score for caption in captions],
            token_ids=[caption.token_ids for caption in captions],
            seeds=[one.seed for one in captions if one.seed is not None] if request.num_drawn else None,
            statistics=call.statistics,
        )
        return output if return_dict else output.to_tuple()

    @inference
    def score(
        self,
        image: Images | None,
        prompt: str | Sequence[str],
        *,
        tokens: torch.Tensor | None = None,
        languages: Sequence[str] | None = None,
        max_batch_size: int | None = None,
    ) -> torch.Tensor:
        """
        Caption loss of pairs of a picture and a text, in nats per text token: the lower, the better they fit.

        Losses of different texts of one picture can be compared, and of one text for different pictures.

        Args:
            image, tokens: As for `__call__`; `image` may be `None` with tokens.
            prompt (`str` or list of `str`): Texts, one per picture; a single picture or text is used for all.
                All of their words count, also those that the model does not know; a warning names them.
            languages (sequence of `"en"` or `"zh"`, *optional*): Of each text; by default what the tokenizer says.
            max_batch_size (`int`, defaults to 16): Pairs that are computed at a time.

        Returns:
            `torch.Tensor` of shape `(num_pairs,)`: float32 on the CPU.

        Raises:
            TypeError, ValueError: If an argument cannot be used; the message says which and why.
        """
        prompts = check_prompts(prompt)
        (max_batch_size,) = check_counts(max_batch_size=max_batch_size)
        batch_size = max_batch_size or DEFAULT_MAX_BATCH_SIZE
        self.check_texts(prompts)
        with self._running() as call:
            tokens = self._low_tokens(image, tokens, batch_size, call)
            return self._score(prompts, tokens, languages, batch_size)

    def caption_loss(
        self,
        image: Images | None,
        prompt: str | Sequence[str],
        *,
        tokens: torch.Tensor | None = None,
        max_batch_size: int | None = None,
    ) -> torch.Tensor:
        """
        Caption loss of pairs of a picture and a text, in nats per text token: the lower, the better they fit. This is
        `score`, by a name that means the same with every family.

        Args:
            image, prompt, tokens, max_batch_size: As for `score`.

        Returns:
            `torch.Tensor` of shape `(num_pairs,)`: float32 on the CPU.

        Raises:
            TypeError, ValueError: If an argument cannot be used; the message says which and why.
        """
        return self.score(image, prompt, tokens=tokens, max_batch_size=max_batch_size)

    def check_texts(self, prompt: str | Sequence[str]) -> None:
        """
        Raise the error that `score` would raise for these texts, without computing anything.

        Raises:
            ValueError: If a text is empty or too long.
        """
        longest, texts = self.transformer.config.max_text_tokens, check_prompts(prompt)
        for text in texts:
            tokens = self.tokenizer.encode(text)
            if not 0 < len(tokens) <= longest:
                advice = " Shorten it." * (len(tokens) > longest)
                raise ValueError(
                    f"`prompt` must have 1 to {longest} tokens, but {quote(text)} has {len(tokens)}.{advice}"
                )
            self._require_embeddings([tokens], "`prompt`")
        self._tell_unknown(texts, scored=True)

    # Stages ----------------------------------------------------------------------------------------------------------

    def _score(
        self,
        prompts: list[str],
        tokens: torch.Tensor,
        languages: Sequence[str] | None,
        batch_size: int,
    ) -> torch.Tensor:
        """Caption losses of pairs."""
        count = max(len(tokens), len(prompts))
        if not {len(tokens), len(prompts)} <= {1, count}:
            raise ValueError(
                f"`prompt` must be one, or one per picture ({len(tokens)}), but there are {len(prompts)}."
            )
        if languages is not None and (len(languages) != count or not set(languages) <= set(LANGUAGES)):
            raise ValueError(f"`languages` must be one of {LANGUAGES} for each of {count} pairs, but are {languages}.")
        return caption_losses(
            self.transformer,
            self.tokenizer,
            tokens.expand(count, -1, -1),
            prompts * (count // len(prompts)),
            languages=languages,
            max_batch_size=batch_size,
            device=self._device_of(self.transformer),
        )

    def _low_tokens(
        self, image: Images | None, tokens: torch.Tensor | None, batch_size: int, call: Call
    ) -> torch.Tensor:
        """Low-resolution tokens of what came: `(num_images, rows, columns)`."""
        if (image is None) == (tokens is None):
            raise ValueError("Give either `image` or `tokens`.")
        if tokens is None:
            pixels = torch.stack([self._fit(picture) for picture in read_pictures(image)])
            with call.measure("vqvae"):
                return torch.cat([self._encode_pixels(part) for part in pixels.split(batch_size)])
        return check_tokens(tokens, self.transformer.config.num_image_tokens, self.transformer.config.image_grid)

    def _fit(self, picture: Picture) -> torch.Tensor:
        """The middle of a picture at low resolution: `(3, height, width)`."""
        height, width = self.sizes[0]
        pixels = picture.on_white()
        if height == width:
            pixels = center_crop(pixels, min(picture.size))
        return resize(pixels[None], (height, width))[0]

    def _captions(
        self, request: _Request, call: Call, tokens: torch.Tensor, generators: list[torch.Generator]
    ) -> list[_Caption]:
        """The captions of all pictures, picture by picture."""
        num_drawn = request.num_drawn

        def write(part: slice) -> list[list[WrittenText]]:
            call.stop_if_interrupted()
            own = generators[part.start * num_drawn : part.stop * num_drawn]
            return self._write(request, tokens[part], own, functools.partial(call.count_pass, "transformer"))

        pictures_at_a_time = max(1, request.batch_size // request.num_texts)
        parts = run_in_batches(write, len(tokens), pictures_at_a_time, generators=generators)
        captions = []
        for index, texts in enumerate(texts for part in parts for texts in part):
            own = generators[index * num_drawn : (index + 1) * num_drawn]
            captions += self._best(request, tokens[index], texts, [one.initial_seed() for one in own])
            call.progress.update()
        return captions

    def _write(
        self,
        request: _Request,
        tokens: torch.Tensor,
        generators: list[torch.Generator],
        on_pass: Callable[[], None],
    ) -> list[list[WrittenText]]:
        """Texts of each picture."""
        starts = {"en": self.tokenizer.start_of_english_id, "zh": self.tokenizer.start_of_chinese_id}
        context = sequences.caption(tokens.cpu(), [starts[request.language]] * len(tokens), self.layout)
        allowed, ends = self._allowed(request.language), self._ends()
        if request.end != "sentence":
            ends = torch.zeros_like(ends)
        device = self._device_of(self.transformer)
        about = (self.transformer, context)
        bounds = (allowed, ends, request.max_length)
        ways = {"device": device, "decoding": self._decoding, "on_pass": on_pass}
        if request.strategy == "beam":
            return search_texts(*about, *bounds, num_beams=request.num_beams, **ways)
        settings = request.settings
        sample = functools.partial(sample_tokens, temperature=settings.temperature, top_k=settings.top_k)
        texts = write_texts(
            *about,
            sample if request.num_drawn else _likeliest,
            *bounds,
            num_texts_per_context=request.num_texts,
            generator=generators or None,
            **ways,
        )
        return [texts[part] for part in slices(len(texts), request.num_texts)]

    def _best(
        self, request: _Request, picture: torch.Tensor, texts: list[WrittenText], seeds: list[int]
    ) -> list[_Caption]:
        """The captions of one picture: its texts, cut and ranked."""
        ids = [text.token_ids for text in texts]
        if request.end != "length":
            ids = [own if text.is_complete else self._cut(request, picture, own) for own, text in zip(ids, texts)]
        scores = torch.tensor([text.mean_log_probability for text in texts])
        order = list(range(len(texts)))
        if request.strategy == "best_of":
            if request.rank_by == "image":
                scores = -self._image_losses(request, picture, ids)
            order.sort(key=lambda index: -float(scores[index]))
            first = {tuple(ids[index]): index for index in reversed(order)}
            order.sort(key=lambda index: first[tuple(ids[index])] != index)  # texts drawn twice come last
        return [
            _Caption(
                self.tokenizer.decode(ids[index]).strip(),
                float(scores[index]),
                ids[index],
                seeds[index] if seeds else None,
            )
            for index in order[: request.num_kept]
        ]

    def _cut(self, request: _Request, picture: torch.Tensor, ids: list[int]) -> list[int]:
        """The part of a text, up to the end of a word, after which the picture is most likely."""
        pieces = self.tokenizer.convert_ids_to_tokens(ids)
        lengths = [
            length
            for length in range(1, len(ids) + 1)
            if (length == len(ids) or request.language == "zh" or pieces[length].startswith("▁"))
            and any(character.isalnum() for character in pieces[length - 1])
        ]
        if not lengths:
            return ids
        losses = self._image_losses(request, picture, [ids[:length] for length in lengths])
        return ids[: lengths[int(losses.argmin())]]

    def _image_losses(self, request: _Request, picture: torch.Tensor, texts: list[list[int]]) -> torch.Tensor:
        return image_losses(
            self.transformer,
            picture[None].expand(len(texts), -1, -1),
            texts,
            max_batch_size=request.batch_size,
            device=self._device_of(self.transformer),
        )

    # Vocabulary ------------------------------------------------------------------------------------------------------

    def _allowed(self, language: str) -> torch.Tensor:
        """What a text of a language may hold, `(vocab_size,)`: its pieces, and common ones that spell something."""
        tokenizer = self.tokenizer
        allowed = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
        first, end = tokenizer.language_ranges[language]
        allowed[first:end] = True
        for index in range(tokenizer.num_image_tokens, tokenizer.language_ranges["en"][0]):
            piece = tokenizer.convert_ids_to_tokens(index)
            allowed[index] = not (piece.startswith("<") and piece.endswith(">") and len(piece) > 1)
        allowed[tokenizer.all_special_ids] = False
        return allowed

    def _ends(self) -> torch.Tensor:
        """The pieces that end a sentence, `(vocab_size,)`."""
        ends = torch.zeros(self.tokenizer.vocab_size, dtype=torch.bool)
        ends[self.tokenizer.sentence_end_ids] = True
        return ends


def _likeliest(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


CogView2CaptionPipeline.__module__ = "cogview_pipelines"
