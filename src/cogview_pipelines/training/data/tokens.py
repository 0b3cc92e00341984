"""
Pictures as tokens with their captions: what the transformers of both families train on.

A token folder, as `training_scripts/prepare_tokens.py` writes it, is a folder of shards (`shards.py`), or holds two
files:

- `tokens.safetensors` with the tensors `low` and (for super-resolution) `fine`, each of shape
  `(num_pictures, rows, columns)`;
- `captions.jsonl` with one object a picture: captions by language, `{"en": [...], "zh": [...]}`, of which one may be
  missing; an optional `weight`, the relative chance of the picture; optional `targets`, captions by language that
  captioning writes in place of those; and an optional `style`, what its style is called, by language or one name.
"""

import bisect
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from ...generation.token_sequence import TokenSequence
from ...json_lines import read_lines, write_lines
from ...models.tokenization import CodesAndPiecesTokenizer
from ..adapters import LoraOptions
from ..arguments import UNNOTICED, TrainConfig
from ..processes import start_processes
from ..run_folder import replacing
from ..samples_cogview import words_of_style
from .captions import LANGUAGES, TextRows, parse_captions, tell_blank, tell_text_losses
from .chances import Chances, EpochOrder, MixedChances, WeightedIndex
from .draws import Draw, draw_two_indices
from .shards import (
    DEFAULT_CACHE_GB,
    ShardChances,
    ShardedCaptions,
    ShardedTokens,
    TokenShards,
    find_damaged,
    is_shard_folder,
)

MOST_ENCODED = {"folder": 2**16, "shards": 2**12}  # captions whose ids are kept; of very many, few come again soon

TOKENS_FILE = "tokens.safetensors"
CAPTIONS_FILE = "captions.jsonl"

logger = logging.getLogger(__name__)


@dataclass
class TokenData:
    """
    Pictures as tokens with their captions, in memory or in shards, whose rows are read when they are asked for.

    Args:
        low (`torch.Tensor` or [`ShardedTokens`] of shape `(num_pictures, rows, columns)`): Low-resolution tokens.
        fine (likewise, *optional*): Super-resolved tokens.
        captions (sequence of `dict[str, list[str]]`): Of each picture, its captions by language.
        weights (`torch.Tensor` of shape `(num_pictures,)` or [`Chances`]): Relative chance of each picture.
        encode (`Callable`): Token ids of a caption. Captions are encoded when drawn: they are many, and few are drawn.
        targets (sequence of `dict[str, list[str]]`, *optional*):
            Of each picture, what captioning writes, if that is not what pictures are drawn from.
        styles (sequence of `dict[str, list[str]]`): Of each picture, what its style is called; empty where it
            has none.
        has_styles (`bool`, *optional*): Whether some picture has one; by default looked up in `styles`.
        epoch_seed (`int`, *optional*): Go through the pictures in epochs, in orders that are drawn from this seed; by
            default each sample is drawn by weight, with replacement.
        num_own (`int`, *optional*): So many pictures are of this set, and the rest of others that it is mixed with; by
            default all are.
    """

    low: torch.Tensor | ShardedTokens
    fine: torch.Tensor | ShardedTokens | None
    captions: Sequence[dict[str, list[str]]]
    weights: torch.Tensor | Chances
    encode: Callable[[str], list[int]]
    targets: Sequence[dict[str, list[str]]] | None = None
    styles: Sequence[dict[str, list[str]]] = field(default_factory=list)
    has_styles: bool | None = None
    epoch_seed: int | None = None
    num_own: int | None = None

    def __post_init__(self):
        self.styles = self.styles or [{} for _ in self.captions]
        if self.has_styles is None:
            self.has_styles = any(self.styles)

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        tokenizer: CodesAndPiecesTokenizer,
        excluded_shards: Sequence[str] = (),
        **cache: Any,
    ) -> "TokenData":
        """
        Read a token folder, or open one of shards.

        Args:
            folder (`str` or `Path`): The folder; or the URL of a folder of shards, as fsspec reads it.
            tokenizer ([`CodesAndPiecesTokenizer`]): Of the captions.
            excluded_shards (sequence of `str`): Names of shards to leave out, such as [`find_damaged`] gives.
            cache: `cache` and `cache_gb` of [`TokenShards`].

        Raises:
            ValueError: If files are missing or damaged, do not fit each other, or hold tokens that the tokenizer has
                no room for.
        """
        if is_shard_folder(folder):
            encode = functools.lru_cache(MOST_ENCODED["shards"])(tokenizer.encode)
            return cls._open_shards(TokenShards(folder, excluded_shards, **cache), encode, tokenizer.num_image_tokens)
        folder = Path(folder)
        encode = functools.lru_cache(MOST_ENCODED["folder"])(tokenizer.encode)
        for name in (TOKENS_FILE, CAPTIONS_FILE):
            if not (folder / name).is_file():
                raise ValueError(
                    f"`data` must be a folder with {TOKENS_FILE} and {CAPTIONS_FILE}, but {folder} has no {name}."
                )
        try:
            tensors = load_file(folder / TOKENS_FILE)
        except SafetensorError as error:
            raise ValueError(f"`data` has a damaged {TOKENS_FILE} ({error}). Make it again.") from error
        captions, weights, targets, styles, num_blank = [], [], [], [], 0
        for number, line in read_lines(folder / CAPTIONS_FILE):
            texts, weight, blank = parse_captions(line, f"Line {number} of {folder / CAPTIONS_FILE}")
            num_blank += blank
            styles.append(texts.pop("style", {}))
            targets.append(texts.pop("targets", texts))
            captions.append(texts)
            weights.append(weight)
        if num_blank:
            logger.warning("`data` %s: %s", folder, tell_blank(num_blank))
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
        return cls(low, fine, captions, torch.tensor(weights, dtype=torch.float64), encode, targets, styles)

    @classmethod
    def _open_shards(cls, shards: TokenShards, encode: Callable[[str], list[int]], num_codes: int) -> "TokenData":
        for name, largest in shards.largest_codes.items():
            if largest >= num_codes:
                raise ValueError(f"`data` has tokens in `{name}` outside of 0..{num_codes - 1}: {largest}.")
        if shards.num_codes not in (None, num_codes):
            raise ValueError(
                f"`data` {shards.folder} was made with an image tokenizer of {shards.num_codes} codes, but the text "
                f"tokenizer has room for {num_codes}."
            )
        return cls(
            ShardedTokens(shards, "low"),
            ShardedTokens(shards, "fine") if "fine" in shards.arrays else None,
            ShardedCaptions(shards),
            ShardChances(shards),
            encode,
            ShardedCaptions(shards, "targets"),
            ShardedCaptions(shards, "style"),
            has_styles=shards.num_styles > 0,
        )

    @property
    def chances(self) -> Chances:
        """How often each picture is drawn."""
        return self._chances

    @functools.cached_property
    def _chances(self) -> Chances:
        return WeightedIndex(self.weights) if isinstance(self.weights, torch.Tensor) else self.weights

    def with_auxiliary(self, auxiliary: "TokenData", probability: float) -> "TokenData":
        """
        These pictures and others, which are drawn with the given probability.

        Fine tokens stay only if both have them.

        Raises:
            ValueError: If `probability` is outside of 0..1, or the pictures have other sizes.
        """
        return self.mixed_with([auxiliary], [probability])

    def mixed_with(self, others: Sequence["TokenData"], shares: Sequence[float]) -> "TokenData":
        """
        These pictures and those of other sets, of which each has a share of the samples.

        Fine tokens stay only if all have them.

        Args:
            others (sequence of [`TokenData`]): The other sets.
            shares (sequence of `float`): The share of each; the rest is of these pictures.

        Raises:
            ValueError: If shares are outside of 0..1 or more than 1 together, or the pictures have other sizes.
        """
        rest = 1 - sum(shares)
        if len(shares) != len(others) or min(shares) < 0 or rest < -1e-9:
            shown = shares[0] if len(shares) == 1 else list(shares)
            raise ValueError(
                f"`auxiliary_probability` must be from 0 to 1, but is {shown}."
                if len(shares) == len(others) == 1
                else f"`auxiliary_probability` must have a share for each of the {len(others)} folders of "
                f"`auxiliary_data`, not more than 1 together, but is {shown}."
            )
        sets = [self, *others]
        for name in ("low", "fine"):
            for other in others:
                mine, its = getattr(self, name), getattr(other, name)
                if mine is not None and its is not None and mine.shape[1:] != its.shape[1:]:
                    raise ValueError(
                        f"`auxiliary_data` must have tokens `{name}` of {tuple(mine.shape[1:])} a picture, as `data` "
                        f"has, but has {tuple(its.shape[1:])}."
                    )
        has_fine = all(each.fine is not None for each in sets)
        return TokenData(
            OneAfterAnother([each.low for each in sets]),
            OneAfterAnother([each.fine for each in sets]) if has_fine else None,
            OneAfterAnother([each.captions for each in sets]),
            MixedChances([each.chances for each in sets], [max(rest, 0.0), *shares]),
            self.encode,
            OneAfterAnother([each.captions if each.targets is None else each.targets for each in sets]),
            OneAfterAnother([each.styles for each in sets]),
            any(each.has_styles for each in sets),
            self.epoch_seed,
            len(self),
        )

    def is_auxiliary(self, index: int) -> bool:
        """Whether a picture is of another set, which these are mixed with."""
        return self.num_own is not None and index >= self.num_own

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
        (folder / CAPTIONS_FILE).unlink(missing_ok=True)  # those of before are not of these tokens
        with replacing(folder / TOKENS_FILE) as partial:
            save_file({name: value.to(torch.int32).contiguous() for name, value in tensors.items()}, partial)
        with replacing(folder / CAPTIONS_FILE) as partial, open(partial, "w", encoding="utf-8") as file:
            write_lines(file, captions)

    def texts(self, styles: bool = True, targets: bool = False) -> Iterator[str]:
        """
        All texts that pictures are drawn from, in both languages.

        Args:
            styles (`bool`): Also the words of what pictures are called by their style, as CogView learns styles.
                CogView2 reads captions alone.
            targets (`bool`): The texts that captioning writes in their place, whose words a model does not draw.
        """
        captions = self.targets if targets and self.targets is not None else self.captions
        for own, names in zip(captions, self.styles):
            yield from (text for language in LANGUAGES for text in own.get(language, ()))
            if styles:
                for language, of_style in names.items():
                    yield from (text for name in of_style for text in words_of_style(name, language))

    def draw(self, generator: torch.Generator, number: int | None = None) -> int:
        """
        The index of a picture.

        Args:
            generator (`torch.Generator`): Draws it by weight, with replacement.
            number (`int`, *optional*): Of the sample in the run, which says it instead where pictures are gone through
                in epochs.
        """
        if number is None or self.epoch_seed is None:
            return self.chances.draw(generator)
        return self._epochs.index(number)

    def draw_all(self, samples: Sequence[int], generators: Sequence[torch.Generator]) -> list[int]:
        """The indices of the pictures of some samples, as [`draw`][TokenData.draw] draws each from its generator."""
        if self.epoch_seed is None:
            return [self.chances.draw(generator) for generator in generators]
        return self._epochs.indices(samples)

    @functools.cached_property
    def _epochs(self) -> EpochOrder:
        assert self.epoch_seed is not None
        return EpochOrder(self.chances, self.epoch_seed)

    def draw_caption(self, index: int, generator: torch.Generator, to_write: bool = False) -> list[int]:
        """
        Token ids of a random caption of a picture.

        Args:
            index (`int`): Which picture.
            generator (`torch.Generator`): Source of chance.
            to_write (`bool`): One that captioning writes, not one that pictures are drawn from.
        """
        return self.draw_language_and_caption(index, generator, to_write)[1]

    def draw_language_and_caption(
        self, index: int, generator: torch.Generator, to_write: bool = False
    ) -> tuple[str, list[int]]:
        """As [`TokenData.draw_caption`]: a language, and the token ids of one of its captions."""
        captions = self.targets if to_write and self.targets is not None else self.captions
        languages, by_language = zip(*captions[index].items(), strict=True)
        language, caption = draw_two_indices(len(by_language), lambda which: len(by_language[which]), generator)
        return languages[language], self.encode(by_language[language][caption])


def draw_language(data: TokenData, draw: Draw, generator: torch.Generator) -> str:
    """The language of the one sample of a draw, where a caption is the first thing that is drawn of a picture."""
    (index,) = data.draw_all(draw.samples, [generator])
    return data.draw_language_and_caption(index, generator)[0]


class OneAfterAnother(Sequence):
    """Rows of several sets, indexed as those of one: by a number, a slice or numbers."""

    def __init__(self, sets: Sequence):
        self.sets = list(sets)
        self.first = [0, *itertools.accumulate(map(len, self.sets))]
        if hasattr(self.sets[0], "shape"):
            self.shape = (self.first[-1], *self.sets[0].shape[1:])

    def __len__(self) -> int:
        return self.first[-1]

    def __iter__(self) -> Iterator:
        return itertools.chain.from_iterable(self.sets)

    def __getitem__(self, index: int | slice | Sequence[int]):
        if isinstance(index, int):
            if not 0 <= index < len(self):
                raise IndexError(f"{index} is outside of 0..{len(self) - 1}.")
            which = bisect.bisect_right(self.first, index) - 1
            return self.sets[which][index - self.first[which]]
        indices = [int(each) for each in (range(len(self))[index] if isinstance(index, slice) else index)]
        if not hasattr(self, "shape") or not indices:
            return [self[each] for each in indices]
        by_set: dict[int, list[int]] = {}
        for row, each in enumerate(indices):
            if not 0 <= each < len(self):
                raise IndexError(f"{each} is outside of 0..{len(self) - 1}.")
            by_set.setdefault(bisect.bisect_right(self.first, each) - 1, []).append(row)
        parts = [
            self.sets[which][[indices[row] - self.first[which] for row in rows]] for which, rows in by_set.items()
        ]
        found = parts[0].new_empty(len(indices), *self.shape[1:])
        for rows, part in zip(by_set.values(), parts):
            found[rows] = part
        return found


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

    data: str = field(kw_only=True, metadata={"help": "Token folder, as prepare_tokens.py writes it, or of shards."})
    tokenizer: str = field(kw_only=True, metadata={"help": "Folder or Hub id of the tokenizer."})
    auxiliary_data: list[str] | None = field(
        default=None,
        metadata={"help": "One or more other token folders, for what helps but is not what the model is for."},
    )
    auxiliary_probability: list[float] = field(
        default_factory=lambda: [0.5], metadata={"help": "Share of samples from each folder of `auxiliary_data`."}
    )
    data_order: str = field(
        default="weighted",
        metadata={
            "help": "weighted: each sample is a picture by its weight, with replacement. epochs: all pictures once, "
            "in an order that the seed draws, then again in another; where weights differ, as often as they say.",
            "choices": ["weighted", "epochs"],
            "resume": "other samples are drawn from here on",
        },
    )
    excluded_shards: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Shards of token folders to leave out, as FOLDER/NAME.safetensors; those that are found damaged "
            "are added.",
            "resume": "other samples are drawn from here on",
        },
    )
    verify_data: bool = field(
        default=False,
        metadata={"help": "Compare the checksums of all shards before training; else sizes.", "resume": UNNOTICED},
    )
    data_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder for shards that are on an object store (`data` s3://..., gs://..., https://...); by "
            "default beside the cache of the Hub. Runs and processes may share it.",
            "resume": UNNOTICED,
        },
    )
    data_cache_gb: float = field(
        default=DEFAULT_CACHE_GB,
        metadata={"help": "What shards may take in `data_cache`, in GB (10^9 bytes).", "resume": UNNOTICED},
    )
    validation_data: str | None = field(
        default=None,
        metadata={
            "help": "Token folder of pictures that are not trained on; the loss of some goes to metrics.jsonl, of all "
            "and by task and language.",
            "resume": UNNOTICED,
        },
    )
    validation_samples: int = field(
        default=128, metadata={"help": "How many samples of `validation_data`.", "resume": UNNOTICED}
    )

    def load_data(self, tokenizer: CodesAndPiecesTokenizer) -> TokenData:
        """The pictures to train on; raises `ValueError` as [`TokenData.load`] does."""
        others = [self.auxiliary_data] if isinstance(self.auxiliary_data, str) else self.auxiliary_data or []
        shares = self.auxiliary_probability
        data, *auxiliary = (self._open(folder, tokenizer) for folder in (self.data, *others))
        if auxiliary:
            data = data.mixed_with(auxiliary, shares if isinstance(shares, Sequence) else [shares])
        return replace(data, epoch_seed=self.seed if self.data_order == "epochs" else None)

    def _open(self, folder: str, tokenizer: CodesAndPiecesTokenizer) -> TokenData:
        """A token folder without its damaged shards, which are named in a warning and noted among the options."""
        if not is_shard_folder(folder):
            return TokenData.load(folder, tokenizer)
        processes = start_processes()
        found = find_damaged(folder, self.verify_data, processes.process_index, processes.num_processes)
        damaged: dict[str, str] = {}
        for each in gather_object([found]) if processes.num_processes > 1 else [found]:
            damaged |= each  # each process may see other disks, and has read other shards
        for name, problem in sorted(damaged.items()):
            path = os.path.join(folder, name)
            if path not in self.excluded_shards:
                self.excluded_shards = sorted([*self.excluded_shards, path])
                if processes.is_main_process:
                    logger.warning("`data`: %s is left out: %s.", path, problem)
        excluded = [os.path.relpath(path, folder) for path in self.excluded_shards]
        return TokenData.load(folder, tokenizer, excluded, cache=self.data_cache, cache_gb=self.data_cache_gb)

    def learned_words(
        self,
        data: TokenData,
        tokenizer: CodesAndPiecesTokenizer,
        component: str = "transformer",
        styles: bool = False,
    ) -> list[str]:
        """
        Words of the texts that an adapter learns: those that are not among the ones that its model knows.

        Args:
            data ([`TokenData`]): What it is trained on.
            tokenizer ([`CodesAndPiecesTokenizer`]): Of the model.
            component (`str`): What the model is called in a pipeline; a `caption_transformer` learns what it writes.
            styles (`bool`): Whether it is trained on what pictures are called by their style, too.
        """
        if self.lora_rank is None:
            return []
        return tokenizer.unknown_words(data.texts(styles, targets=component == "caption_transformer"), component)

    def tell_losses(
        self,
        data: TokenData,
        tokenizer: CodesAndPiecesTokenizer,
        max_text_tokens: int,
        targets: bool = False,
        styles: bool = False,
    ) -> None:
        """
        Say at the end of a script what of the texts the model did not get to read or write.

        Args:
            data ([`TokenData`]): What it was trained on.
            tokenizer ([`CodesAndPiecesTokenizer`]): Of the model.
            max_text_tokens (`int`): So many tokens of a text it took.
            targets (`bool`): Whether it wrote captions.
            styles (`bool`): Whether it read the names of styles.
        """
        if start_processes().is_main_process:
            rows = TextRows(data.captions, data.targets if targets else None, data.styles if styles else None)
            tell_text_losses(rows, tokenizer, max_text_tokens)

    def validation_batches(
        self,
        tokenizer: CodesAndPiecesTokenizer,
        make_batch: Callable[[TokenData, Draw], object],
        draw_kind: Callable[[TokenData, Draw, torch.Generator], str],
    ) -> dict[str, list]:
        """
        Batches of pictures that are not trained on, the same in every run with this seed; none without
        `validation_data`.

        Args:
            tokenizer ([`CodesAndPiecesTokenizer`]): Of the captions.
            make_batch (`Callable`): What makes a batch of some data and a draw, as for training.
            draw_kind (`Callable`): Of what kind the one sample of some data and a draw is, such as
                `"text_to_image/en"`, drawn from its generator as `make_batch` draws it.

        Returns:
            `dict[str, list]`: The batches by kind.
        """
        if self.validation_data is None:
            return {}
        data, size = self._open(self.validation_data, tokenizer), self.batch_size
        by_kind: dict[str, list[int]] = {}
        for number in range(self.validation_samples):
            draw = Draw(0, [number])
            by_kind.setdefault(draw_kind(data, draw, *draw.generators(self.seed)), []).append(number)
        return {
            kind: [make_batch(data, Draw(0, numbers[start : start + size])) for start in range(0, len(numbers), size)]
            for kind, numbers in sorted(by_kind.items())
        }
