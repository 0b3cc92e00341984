"""
Pictures as tokens with their captions: what the transformers of both families train on.

A token folder, as `training_scripts/prepare_tokens.py` writes it, holds two files:

- `tokens.safetensors` with the tensors `low` and (for super-resolution) `fine`, each of shape
  `(num_pictures, rows, columns)`;
- `captions.jsonl` with one object a picture: captions by language, `{"en": [...], "zh": [...]}`, of which one may be
  missing; an optional `weight`, the relative chance of the picture; optional `targets`, captions by language that
  captioning writes in place of those; and an optional `style`, what its style is called, by language or one name.
"""

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from ...generation.token_sequence import TokenSequence
from ...json_lines import parse_object, read_lines, write_lines
from ...models.tokenization import CodesAndPiecesTokenizer
from ..adapters import LoraOptions
from ..arguments import UNNOTICED, TrainConfig
from ..processes import start_processes
from ..run_folder import set_modes
from .draws import Draw, WeightedIndex, draw_index

TOKENS_FILE = "tokens.safetensors"
CAPTIONS_FILE = "captions.jsonl"
LANGUAGES = ("en", "zh")
MOST_LOOKED_AT = 2000  # captions, to say what is lost of them

logger = logging.getLogger(__name__)


@dataclass
class TokenData:
    """
    Args:
        low (`torch.Tensor` of shape `(num_pictures, rows, columns)`): Low-resolution tokens.
        fine (`torch.Tensor`, *optional*): Super-resolved tokens, likewise.
        captions (`list[dict[str, list[str]]]`): Of each picture, its captions by language.
        weights (`torch.Tensor` of shape `(num_pictures,)`): Relative chance of each picture.
        encode (`Callable`): Token ids of a caption. Captions are encoded when drawn: they are many, and few are drawn.
        targets (`list[dict[str, list[str]]]`, *optional*):
            Of each picture, what captioning writes, if that is not what pictures are drawn from.
        styles (`list[dict[str, list[str]]]`): Of each picture, what its style is called; empty where it has none.
    """

    low: torch.Tensor
    fine: torch.Tensor | None
    captions: list[dict[str, list[str]]]
    weights: torch.Tensor
    encode: Callable[[str], list[int]]
    targets: list[dict[str, list[str]]] | None = None
    styles: list[dict[str, list[str]]] = field(default_factory=list)

    def __post_init__(self):
        self.styles = self.styles or [{} for _ in self.captions]

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def load(cls, folder: str | Path, tokenizer: CodesAndPiecesTokenizer) -> "TokenData":
        """
        Read a token folder.

        Raises:
            ValueError: If files are missing or damaged, do not fit each other, or hold tokens that the tokenizer has
                no room for.
        """
        folder = Path(folder)
        for name in (TOKENS_FILE, CAPTIONS_FILE):
            if not (folder / name).is_file():
                raise ValueError(
                    f"`data` must be a folder with {TOKENS_FILE} and {CAPTIONS_FILE}, but {folder} has no {name}."
                )
        try:
            tensors = load_file(folder / TOKENS_FILE)
        except SafetensorError as error:
            raise ValueError(f"`data` has a damaged {TOKENS_FILE} ({error}). Make it again.") from error
        captions, weights, targets, styles = [], [], [], []
        for number, line in read_lines(folder / CAPTIONS_FILE):
            texts, weight = parse_captions(line, f"Line {number} of {folder / CAPTIONS_FILE}")
            styles.append(texts.pop("style", {}))
            targets.append(texts.pop("targets", texts))
            captions.append(texts)
            weights.append(weight)
        low, fine = tensors.get("low"), tensors.get("fine")
        if low is None or not sum(weights):
            what = "tensor `low`" if low is None else "pictures of a `weight` above 0"
            raise ValueError(f"`data` has no {what} in {folder}.")
        for name, value in (("low", low), ("fine", fine)):
            if value is not None and len(value) != len(captions):
                raise ValueError(
                    f"`data` has {len(value)} pictures in `{name}`, but {len(captions)} lines of captions."
                )
            if value is not None and not 0 <= int(value.min()) <= int(value.max()) < tokenizer.num_image_tokens:
                raise ValueError(f"`data` has tokens in `{name}` outside of 0..{tokenizer.num_image_tokens - 1}.")
        encode = functools.lru_cache(2**16)(tokenizer.encode)
        return cls(low, fine, captions, torch.tensor(weights, dtype=torch.float64), encode, targets, styles)

    def with_auxiliary(self, auxiliary: "TokenData", probability: float) -> "TokenData":
        """
        These pictures and others, which are drawn with the given probability.

        Fine tokens stay only if both have them.

        Raises:
            ValueError: If `probability` is outside of 0..1, or the pictures have other sizes.
        """
        if not 0 <= probability <= 1:
            raise ValueError(f"`auxiliary_probability` must be from 0 to 1, but is {probability}.")
        for name, mine, other in (("low", self.low, auxiliary.low), ("fine", self.fine, auxiliary.fine)):
            if mine is not None and other is not None and mine.shape[1:] != other.shape[1:]:
                raise ValueError(
                    f"`auxiliary_data` must have tokens `{name}` of {tuple(mine.shape[1:])} a picture, as `data` has, "
                    f"but has {tuple(other.shape[1:])}."
                )
        has_fine = self.fine is not None and auxiliary.fine is not None
        return TokenData(
            torch.cat([self.low, auxiliary.low]),
            torch.cat([self.fine, auxiliary.fine]) if has_fine else None,
            self.captions + auxiliary.captions,
            torch.cat(
                [
                    self.weights * ((1 - probability) / self.weights.sum()),
                    auxiliary.weights * (probability / auxiliary.weights.sum()),
                ]
            ),
            self.encode,
            (self.targets or self.captions) + (auxiliary.targets or auxiliary.captions),
            self.styles + auxiliary.styles,
        )

    def require_fit(self, model_config: PreTrainedConfig, tokenizer: CodesAndPiecesTokenizer) -> "TokenData":
        """
        This data, if the model was made for pictures of this size and for this tokenizer.

        Raises:
            ValueError: If the grid of the low-resolution tokens, or an id of the tokenizer, is not the model's.
        """
        grid = tuple(self.low.shape[1:])
        if grid != model_config.image_grid:
            raise ValueError(
                f"`data` has low-resolution pictures of {grid[0]} x {grid[1]} tokens, but the model makes "
                f"{model_config.image_grid[0]} x {model_config.image_grid[1]}. Make it with another `--low_size`."
            )
        for name in ("num_image_tokens", "boi_token_id", "command_token_id", "pad_token_id"):
            value = getattr(tokenizer, name, None)
            if hasattr(model_config, name) and getattr(model_config, name) != value:
                raise ValueError(
                    f"`tokenizer` is not that of the model: its {name} is {value}, the model's "
                    f"{getattr(model_config, name)}."
                )
        return self

    def require_fine(self) -> "TokenData":
        """This data, if it has fine tokens."""
        if self.fine is None:
            raise ValueError(
                "`data` (or `auxiliary_data`) has no fine tokens; make it with `prepare_tokens.py --fine_size`."
            )
        return self

    @staticmethod
    def save(folder: str | Path, tensors: dict[str, torch.Tensor], captions: list[dict]) -> None:
        """Write a token folder; ids are stored as int32."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.to(torch.int32).contiguous() for name, value in tensors.items()}, folder / TOKENS_FILE)
        with open(folder / CAPTIONS_FILE, "w", encoding="utf-8") as file:
            write_lines(file, captions)
        set_modes(folder / TOKENS_FILE)

    def draw(self, generator: torch.Generator) -> int:
        """The index of a picture by its weight, with replacement."""
        return self._index.draw(generator)

    @functools.cached_property
    def _index(self) -> WeightedIndex:
        return WeightedIndex(self.weights)

    def draw_caption(self, index: int, generator: torch.Generator, to_write: bool = False) -> list[int]:
        """
        Token ids of a random caption of a picture: first a language, then one of its captions.

        Args:
            index (`int`): Which picture.
            generator (`torch.Generator`): Source of chance.
            to_write (`bool`): One that captioning writes, not one that pictures are drawn from.
        """
        captions = self.targets if to_write and self.targets is not None else self.captions
        by_language = list(captions[index].values())
        texts = by_language[draw_index(len(by_language), generator)]
        return self.encode(texts[draw_index(len(texts), generator)])


@dataclass
class TextLosses:
    """
    What of some captions a model does not get to read.

    Args:
        captions (`int`): Captions that were looked at.
        cut (`int`): Those with more tokens than it takes.
        longest (`int`): Tokens of the longest.
        pieces (`int`): Tokens of all.
        unknown (`int`): Those that stand for characters without a piece.
        words (`dict[str, int]`): Parts of the texts that it does not know, and in how many captions they are.
    """

    captions: int = 0
    cut: int = 0
    longest: int = 0
    pieces: int = 0
    unknown: int = 0
    words: Counter = field(default_factory=Counter)

    def count(self, text: str, tokenizer: CodesAndPiecesTokenizer, max_text_tokens: int | None) -> None:
        """Look at a caption, for a model that takes so many tokens."""
        ids = tokenizer.encode(text)
        self.captions += 1
        self.longest = max(self.longest, len(ids))
        self.cut += max_text_tokens is not None and len(ids) > max_text_tokens
        self.pieces += len(ids)
        self.unknown += ids.count(tokenizer.unk_token_id)
        self.words.update(set(tokenizer.unknown_parts(text)))

    def sentences(self, max_text_tokens: int | None) -> list[str]:
        """What is lost, in words; empty if nothing is."""
        told = []
        if self.cut:
            told.append(
                f"{self.cut} of {self.captions} captions have more than {max_text_tokens} tokens (the longest "
                f"{self.longest}): their ends are cut off."
            )
        if self.unknown:
            told.append(f"{self.unknown} of {self.pieces} pieces ({self.unknown / self.pieces:.1%}) are unknown.")
        if self.words:
            shown = ", ".join(word for word, _ in self.words.most_common(8))
            more = f" and {len(self.words) - 8} more" if len(self.words) > 8 else ""
            told.append(f"What the tokenizer does not know of the captions: {shown}{more}.")
        return told


def tell_text_losses(
    captions: list[dict], tokenizer: CodesAndPiecesTokenizer, max_text_tokens: int | None
) -> TextLosses:
    """
    Say, as warnings, what of the captions of some pictures is lost: cut off, or unknown.

    Args:
        captions (`list[dict]`): By language, as `TokenData` has them. Of many, some are looked at: `MOST_LOOKED_AT`.
        tokenizer ([`CodesAndPiecesTokenizer`]): Of the model.
        max_text_tokens (`int`, *optional*): What the model takes.
    """
    losses, pictures = TextLosses(), captions[:: -(-len(captions) // MOST_LOOKED_AT) or 1]
    for picture in pictures:
        texts = [text for language in LANGUAGES for text in picture.get(language, ())]
        for text in texts[:: -(-len(texts) // max(1, MOST_LOOKED_AT // len(pictures))) or 1]:
            losses.count(text, tokenizer, max_text_tokens)
    for sentence in losses.sentences(max_text_tokens):
        logger.warning(sentence)
    return losses


@dataclass
class CanvasBatch:
    """
    Training samples of a super-resolution model.

    Args:
        context (`TokenSequence`): What the canvas sees.
        canvas_ids (`torch.Tensor` of shape `(batch_size, canvas_length)`): The canvas, `<start_of_image>` where
            unknown.
        labels (`torch.Tensor` of shape `(batch_size, canvas_length)`): The true tokens, -100 where there is no loss.
    """

    context: TokenSequence
    canvas_ids: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> "CanvasBatch":
        """The same batch on another device."""
        return CanvasBatch(self.context.to(device), self.canvas_ids.to(device), self.labels.to(device))


@dataclass
class TokenTrainConfig(LoraOptions, TrainConfig):
    """What the scripts that train on token folders have in common."""

    data: str = field(kw_only=True, metadata={"help": "Token folder, as prepare_tokens.py writes it."})
    tokenizer: str = field(kw_only=True, metadata={"help": "Folder or Hub id of the tokenizer."})
    auxiliary_data: str | None = field(
        default=None, metadata={"help": "A second token folder, for what helps but is not what the model is for."}
    )
    auxiliary_probability: float = field(default=0.5, metadata={"help": "Share of samples from `auxiliary_data`."})
    held_out_data: str | None = field(
        default=None,
        metadata={
            "help": "Token folder of pictures that are not trained on; the loss of some goes to metrics.jsonl.",
            "resume": UNNOTICED,
        },
    )
    held_out_samples: int = field(
        default=128, metadata={"help": "How many samples of `held_out_data`.", "resume": UNNOTICED}
    )

    def load_data(self, tokenizer: CodesAndPiecesTokenizer) -> TokenData:
        """The pictures to train on; raises `ValueError` as [`TokenData.load`] does."""
        data = TokenData.load(self.data, tokenizer)
        if self.auxiliary_data is None:
            return data
        return data.with_auxiliary(TokenData.load(self.auxiliary_data, tokenizer), self.auxiliary_probability)

    def tell_losses(self, data: TokenData, tokenizer: CodesAndPiecesTokenizer, max_text_tokens: int) -> None:
        """Say at the end of a script what of the captions the model did not get to read."""
        if start_processes().is_main_process:
            tell_text_losses(data.captions, tokenizer, max_text_tokens)

    def held_out_batches(
        self, tokenizer: CodesAndPiecesTokenizer, make_batch: Callable[[TokenData, Draw], object]
    ) -> list:
        """
        Batches of the held-out pictures, the same in every run with this seed; none without `held_out_data`.

        Args:
            tokenizer ([`CodesAndPiecesTokenizer`]): Of the captions.
            make_batch (`Callable`): What makes a batch of some data and a draw, as for training.
        """
        if self.held_out_data is None:
            return []
        data, size = TokenData.load(self.held_out_data, tokenizer), self.batch_size
        starts = range(0, self.held_out_samples, size)
        return [make_batch(data, Draw(0, range(start, min(start + size, self.held_out_samples)))) for start in starts]


def parse_captions(line: str, place: str) -> tuple[dict[str, list[str]], float]:
    """
    Captions by language, and the weight, of a line of JSON; a caption alone counts as a list of one.

    Args:
        line (`str`): A JSON object.
        place (`str`): What an error calls the line, such as `"Line 7 of captions.jsonl"`.

    Returns:
        `tuple[dict, float]`: The captions, and under `targets` and `style` what the line has there; the weight.

    Raises:
        ValueError: If the line is no object, has no caption, or its weight is no number of at least 0.
    """
    try:
        row = parse_object(line)
    except ValueError as error:
        raise ValueError(f"{place} {error}") from error
    texts = _captions_by_language(row, place, line)
    if "targets" in row:
        texts["targets"] = _captions_by_language(row["targets"], f"`targets` of {place}", line)
    style = row.get("style")
    if style:
        names = {"en" if style.isascii() else "zh": style} if isinstance(style, str) else style
        texts["style"] = _captions_by_language(names, f"`style` of {place}", line)
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ValueError(f"{place} must have a number of at least 0 as `weight`, but has {weight!r}.")
    return texts, float(weight)


def _captions_by_language(row: object, place: str, line: str) -> dict[str, list[str]]:
    if not isinstance(row, dict) or not any(row.get(language) for language in LANGUAGES):
        raise ValueError(
            f"{place} must be an object with captions in one of {LANGUAGES}, but is {line.strip()[:80]!r}."
        )
    texts = {}
    for language in LANGUAGES:
        if row.get(language):
            texts[language] = [row[language]] if isinstance(row[language], str) else row[language]
            if not isinstance(texts[language], list) or not all(isinstance(text, str) for text in texts[language]):
                raise ValueError(f"{place} must have a text or a list of texts in {language!r}: {row[language]!r}.")
    return texts
