"""
Captions of pictures as a line of JSON holds them, and what of them a model does not get to read.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...json_lines import is_unicode, parse_object
from ...models.tokenization import SENTENCE_ENDS, CodesAndPiecesTokenizer

LANGUAGES = ("en", "zh")
_NAMES = {"en": "English", "zh": "Chinese"}
FULL_STOPS = {"zh": "。"}  # other languages: "."
MOST_LOOKED_AT = 2000  # captions of each language, to say what is lost of them

logger = logging.getLogger(__name__)


class Captions(NamedTuple):
    """
    What a line of JSON says of a picture.

    Args:
        texts (`dict`): Captions by language, each a list; under `targets` and `style` what the line has there.
        weight (`float`): How often the picture is drawn, relative to others.
        num_blank (`int`): Texts of white space that were left out of these.
    """

    texts: dict[str, Any]
    weight: float
    num_blank: int


def parse_captions(line: str, place: object) -> Captions:
    """
    Captions by language, and the weight, of a line of JSON; a caption alone counts as a list of one.

    White space around texts is cut off, and what is then empty is left out.

    Args:
        line (`str`): A JSON object.
        place (`str`, or what becomes one): What an error calls the line, such as `"Line 7 of captions.jsonl"`.

    Raises:
        ValueError: If the line is no object, has no caption or one that is no Unicode text, or its weight is no number
            of at least 0.
    """
    try:
        row = parse_object(line)
    except ValueError as error:
        raise ValueError(f"{place} {error}") from error
    own, num_blank = _captions_by_language(row, place, line)
    texts: dict[str, Any] = {**own}
    if "targets" in row:
        texts["targets"], more = _captions_by_language(row["targets"], f"`targets` of {place}", line)
        num_blank += more
    style = row.get("style")
    if isinstance(style, str):
        style = {"en" if style.isascii() else "zh": style} if style.strip() else None
    if style:
        texts["style"], more = _captions_by_language(style, f"`style` of {place}", line)
        num_blank += more
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ValueError(f"{place} must have a number of at least 0 as `weight`, but has {weight!r}.")
    return Captions(texts, float(weight), num_blank)


def has_text(value: object) -> bool:
    """Whether a value is a text or texts that are not all blank; what is neither is none of these, and counts, too."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return any(text.strip() for text in texts)
    return bool(value)


def _captions_by_language(row: object, place: object, line: str) -> tuple[dict[str, list[str]], int]:
    """The captions, and how many blank ones were left out."""
    if not isinstance(row, dict) or not any(has_text(row.get(language)) for language in LANGUAGES):
        raise ValueError(
            f"{place} must be an object with captions in one of {LANGUAGES}, but is {line.strip()[:80]!r}."
        )
    texts, num_blank = {}, 0
    for language in LANGUAGES:
        if row.get(language):
            own = [row[language]] if isinstance(row[language], str) else row[language]
            if not isinstance(own, list) or not all(isinstance(text, str) for text in own):
                raise ValueError(f"{place} must have a text or a list of texts in {language!r}: {row[language]!r}.")
            for text in own:
                if not is_unicode(text):
                    raise ValueError(
                        f"{place} must have Unicode text in {language!r}, but {text[:80]!r} holds half of a surrogate "
                        "pair. Write it as UTF-8 again."
                    )
            kept = [text.strip() for text in own if text.strip()]
            num_blank += len(own) - len(kept)
            if kept:
                texts[language] = kept
    return texts, num_blank


def tell_blank(num_blank: int) -> str:
    """How many blank captions were left out, in words."""
    return f"{num_blank} blank captions were left out."


@dataclass
class TextRows(Sequence):
    """
    What is said of each picture, in the form of a line of captions.

    Args:
        captions (sequence of `dict`): Captions by language.
        targets, styles (sequences of `dict`, *optional*): By language, what captioning writes, and names of styles.
    """

    captions: Sequence[dict]
    targets: Sequence[dict] | None = None
    styles: Sequence[dict] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        more = {"targets": self.targets, "style": self.styles}
        return {**self.captions[index], **{name: rows[index] for name, rows in more.items() if rows is not None}}


@dataclass
class TextLosses:
    """
    What of some captions a model does not get to read.

    Args:
        captions (`dict[str, int]`): Captions that were looked at, by language, as all that follows.
        cut (`dict[str, int]`): Those with more tokens than it takes.
        pieces (`dict[str, int]`): Tokens of all.
        unknown (`dict[str, int]`): Those that stand for characters without a piece.
        longest (`int`): Tokens of the longest caption.
        lost (`dict[str, int]`): Runs of characters without a piece, and in how many captions they are.
        new_words (`dict[str, int]`): Words that have pieces, but are not among those that the model knows; likewise.
        is_sample (`bool`): Whether there are more captions than those that were looked at.
    """

    captions: Counter = field(default_factory=Counter)
    cut: Counter = field(default_factory=Counter)
    pieces: Counter = field(default_factory=Counter)
    unknown: Counter = field(default_factory=Counter)
    longest: int = 0
    lost: Counter = field(default_factory=Counter)
    new_words: Counter = field(default_factory=Counter)
    is_sample: bool = False

    def count(self, text: str, language: str, tokenizer: CodesAndPiecesTokenizer, max_text_tokens: int | None) -> None:
        """Look at a caption, for a model that takes so many tokens."""
        ids = tokenizer.encode(text)
        self.captions[language] += 1
        self.longest = max(self.longest, len(ids))
        self.cut[language] += max_text_tokens is not None and len(ids) > max_text_tokens
        self.pieces[language] += len(ids)
        self.unknown[language] += ids.count(tokenizer.unk_token_id)
        lost = tokenizer.parts_without_piece(text)
        self.lost.update(lost)
        words = tokenizer.unknown_words([text])
        self.new_words.update(word for word in words if not any(part.casefold() in word for part in lost))

    def sentences(self, max_text_tokens: int | None) -> list[str]:
        """What is lost, and what is new to the model, in words; empty if nothing is."""
        told = []
        of_those = f" (of {self.captions.total()} captions that were looked at)" if self.is_sample else ""
        if self.cut.total():
            told.append(
                f"Captions with more than {max_text_tokens} tokens (the longest has {self.longest}) are cut off: "
                f"{_shares(self.cut, self.captions)}{of_those}."
            )
        if self.unknown.total():
            told.append(f"Pieces that the tokenizer does not know: {_shares(self.unknown, self.pieces)}{of_those}.")
        if self.lost:
            told.append(f"Characters that have no piece, which no model reads: {_most_common(self.lost)}{of_those}.")
        if self.new_words:
            told.append(
                "Words that are new to the model, which training on these captions teaches it: "
                f"{_most_common(self.new_words)}{of_those}."
            )
        return told


def _most_common(parts: Counter, number: int = 8) -> str:
    shown = ", ".join(part for part, _ in parts.most_common(number))
    return f"{shown} and {len(parts) - number} more" if len(parts) > number else shown


def _shares(some: Counter, all_of_them: Counter) -> str:
    """How many of how many, by language."""
    return ", ".join(
        f"{some[language]} of {count} ({some[language] / count:.1%}) in {_NAMES.get(language, language)}"
        for language, count in all_of_them.items()
        if count
    )


def tell_text_losses(
    captions: Sequence[dict], tokenizer: CodesAndPiecesTokenizer, max_text_tokens: int | None
) -> TextLosses:
    """
    Say, as warnings, what of the captions of some pictures is lost, by language: cut off, or without a piece; and
    which words are new to the model. Where not all were looked at, the warnings say so.

    Args:
        captions (sequence of `dict`): By language, as `TokenData` has them, or with `targets` and `style`, as
            [`parse_captions`] gives them: these count as captions. Of many, some are looked at: `MOST_LOOKED_AT`.
        tokenizer ([`CodesAndPiecesTokenizer`]): Of the model.
        max_text_tokens (`int`, *optional*): What the model takes.
    """
    pictures = captions[:: -(-len(captions) // MOST_LOOKED_AT) or 1]
    losses = TextLosses(is_sample=len(pictures) < len(captions))
    most = max(1, MOST_LOOKED_AT // max(1, len(pictures)))  # of a picture and language
    for picture in pictures:
        for language in LANGUAGES:
            texts = _texts(picture, language)
            for text in texts[:: -(-len(texts) // most) or 1]:
                losses.count(text, language, tokenizer, max_text_tokens)
            losses.is_sample |= len(texts) > most
    for sentence in losses.sentences(max_text_tokens):
        logger.warning(sentence)
    return losses


def _texts(picture: dict, language: str) -> list[str]:
    """The captions of a picture in a language, and what there is of targets and names of styles beside them."""
    own = picture.get(language, [])
    more = [text for kind in ("targets", "style") for text in picture.get(kind, {}).get(language, ())]
    return [*own, *(text for text in more if text not in own)]


def with_full_stop(text: list[int], language: str, encode: Callable[[str], list[int]]) -> list[int]:
    """The token ids of a text that ends as a sentence does: with a full stop, if it has no end of its own."""
    *_, stop = encode(FULL_STOPS.get(language, "."))
    ends = {encode(mark)[-1] for mark in SENTENCE_ENDS}
    return text if text and text[-1] in ends else [*text, stop]
