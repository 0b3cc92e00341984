"""
Pictures as tokens with their captions: what CogLM and the super-resolution models train on.

A token folder, as `training_scripts/prepare_tokens.py` writes it, holds `tokens.safetensors` with the tensors `low`
and (for
super-resolution) `fine` of shape `(num_pictures, rows, columns)`, and `captions.jsonl` with one object a picture:
lists of captions by
language (`{"en": [...], "zh": [...]}`, either may be missing) and an optional `weight`, the relative chance of the
    picture.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..sequences import TokenSequence
from ..tokenization_icetk import IcetkTokenizer

TOKENS_FILE = "tokens.safetensors"
CAPTIONS_FILE = "captions.jsonl"
LANGUAGES = ("en", "zh")


@dataclass
class TokenData:
    """
    Args:
        low (`torch.Tensor` of shape `(num_pictures, rows, columns)`): Low-resolution tokens.
        fine (`torch.Tensor`, *optional*): Super-resolved tokens, likewise.
        captions (`list[dict[str, list[list[int]]]]`): Of each picture, the token ids of its captions by language.
        weights (`torch.Tensor` of shape `(num_pictures,)`): Relative chance of each picture.
    """

    low: torch.Tensor
    fine: torch.Tensor | None
    captions: list[dict[str, list[list[int]]]]
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def load(cls, folder: str | Path, tokenizer: IcetkTokenizer) -> "TokenData":
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
        captions, weights, cache = [], [], {}
        with open(folder / CAPTIONS_FILE, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = _parse_line(line, number)
                captions.append(
                    {
                        language: [_encode(tokenizer, text, cache) for text in row[language]]
                        for language in LANGUAGES
                        if row.get(language)
                    }
                )
                weights.append(row.get("weight", 1.0))
        low, fine = tensors.get("low"), tensors.get("fine")
        for name, value in (("low", low), ("fine", fine)):
            if value is not None and len(value) != len(captions):
                raise ValueError(
                    f"`data` has {len(value)} pictures in `{name}`, but {len(captions)} lines of captions."
                )
            if value is not None and not 0 <= int(value.min()) <= int(value.max()) < tokenizer.num_image_tokens:
                raise ValueError(f"`data` has tokens in `{name}` outside of 0..{tokenizer.num_image_tokens - 1}.")
        if low is None:
            raise ValueError(f"`data` has no tensor `low` in {TOKENS_FILE}.")
        return cls(low, fine, captions, torch.tensor(weights))

    def require_fine(self) -> "TokenData":
        """This data, if it has fine tokens."""
        if self.fine is None:
            raise ValueError("`data` has no fine tokens; make it with `prepare_tokens.py --fine_size`.")
        return self

    @staticmethod
    def save(folder: str | Path, tensors: dict[str, torch.Tensor], captions: list[dict]) -> None:
        """Write a token folder; ids are stored as int32."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.to(torch.int32).contiguous() for name, value in tensors.items()}, folder / TOKENS_FILE)
        with open(folder / CAPTIONS_FILE, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in captions)

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """Indices of `count` pictures by their weights, with replacement."""
        return torch.multinomial(self.weights, count, replacement=True, generator=generator).tolist()

    def draw_caption(self, index: int, generator: torch.Generator) -> list[int]:
        """Token ids of a random caption of a picture: first a language, then one of its captions."""
        by_language = list(self.captions[index].values())
        texts = by_language[int(torch.randint(len(by_language), (), generator=generator))]
        return texts[int(torch.randint(len(texts), (), generator=generator))]


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


def _parse_line(line: str, number: int) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"Line {number} of {CAPTIONS_FILE} is no JSON: {error}.") from error
    if not isinstance(row, dict) or not any(row.get(language) for language in LANGUAGES):
        raise ValueError(
            f"Line {number} of {CAPTIONS_FILE} must be an object with captions in {LANGUAGES}: {line.strip()!r}."
        )
    return row


def _encode(tokenizer: IcetkTokenizer, text: str, cache: dict[str, list[int]]) -> list[int]:
    if text not in cache:
        cache[text] = tokenizer.encode(text)
    return cache[text]
