"""
Captions of pictures as a line of JSON holds them, and what of them a model does not get to read.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...json_lines import is_unicode, parse_object
from ...models.tokenization import CodesAndPiecesTokenizer

LANGUAGES = ("en", "zh")
_NAMES = {"en": "English", "zh": "Chinese"}
MOST_LOOKED_AT = 2000  # captions of each language, to say what is lost of them

logger = logging.getLogger(__name__)


def parse_captions(line: str, place: object) -> tuple[dict[str, Any], float]:
    """
    Captions by language, and the weight, of a line of JSON; a caption alone counts as a list of one.

    Args:
        line (`str`): A JSON object.
        place (`str`, or what becomes one): What an error calls the line, such as `"Line 7 of captions.jsonl"`.

    Returns:
        `tuple[dict, float]`: The captions, and under `targets` and `style` what the line has there; the weight.

    Raises:
        ValueError: If the line is no object, has no caption or one that is no Unicode text, or its weight is no number
            of at least 0.
    """
    try:
        row = parse_object(line)
    except ValueError as error:
        raise ValueError(f"{place} {error}") from error
    texts: dict[str, Any] = {**_captions_by_language(row, place, line)}
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


def _captions_by_language(row: object, place: object, line: str) -> dict[str, list[str]]:
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
            for text in texts[language]:
                if not is_unicode(text):
                    raise ValueError(
                        f"{place} must have Unicode text in {language!r}, but {text[:80]!r} holds half of a surrogate "
                        "pair. Write it as UTF-8 again."
                    )
    return texts


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
        words (`dict[str, int]`): Parts of the texts that it does not know, and in how many captions they are.
        is_sample (`bool`): Whether there are more captions than those that were looked at.
    """

    captions: Counter = field(default_factory=Counter)
    cut: Counter = field(default_factory=Counter)
    pieces: Counter = field(default_factory=Counter)
    unknown: Counter = field(default_factory=Counter)
    longest: int = 0
    words: Counter = field(default_factory=Counter)
    is_sample: bool = False

    def count(self, text: str, language: str, tokenizer: CodesAndPiecesTokenizer, max_text_tokens: int | None) -> None:
        """Look at a caption, for a model that takes so many tokens."""
        ids = tokenizer.encode(text)
        self.captions[language] += 1
        self.longest = max(self.longest, len(ids))
        self.cut[language] += max_text_tokens is not None and len(ids) > max_text_tokens
        self.pieces[language] += len(ids)
        self.unknown[language] += ids.count(tokenizer.unk_token_id)
        self.words.update(set(tokenizer.unknown_parts(text)))

    def sentences(self, max_text_tokens: int | None) -> list[str]:
        """What is lost, in words; empty if nothing is."""
        told = []
        of_those = f" (of {self.captions.total()} captions that were looked at)" if self.is_sample else ""
        if self.cut.total():
            told.append(
                f"Captions with more than {max_text_tokens} tokens (the longest has {self.longest}) are cut off: "
                f"{_shares(self.cut, self.captions)}{of_those}."
            )
        if self.unknown.total():
            told.append(f"Pieces that the tokenizer does not know: {_shares(self.unknown, self.pieces)}{of_those}.")
        if self.words:
            shown = ", ".join(word for word, _ in self.words.most_common(8))
            more = f" and {len(self.words) - 8} more" if len(self.words) > 8 else ""
            told.append(f"What the tokenizer does not know of the captions: {shown}{more}{of_those}.")
        return told


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
    Say, as warnings, what of the captions of some pictures is lost, by language: cut off, or unknown. Where not all
    were looked at, the warnings say so.

    Args:
        captions (sequence of `dict`): By language, as `TokenData` has them. Of many, some are looked at:
            `MOST_LOOKED_AT`.
        tokenizer ([`CodesAndPiecesTokenizer`]): Of the model.
        max_text_tokens (`int`, *optional*): What the model takes.
    """
    pictures = captions[:: -(-len(captions) // MOST_LOOKED_AT) or 1]
    losses = TextLosses(is_sample=len(pictures) < len(captions))
    most = max(1, MOST_LOOKED_AT // max(1, len(pictures)))  # of a picture and language
    for picture in pictures:
        for language in LANGUAGES:
            texts = picture.get(language, ())
            for text in texts[:: -(-len(texts) // most) or 1]:
                losses.count(text, language, tokenizer, max_text_tokens)
            losses.is_sample |= len(texts) > most
    for sentence in losses.sentences(max_text_tokens):
        logger.warning(sentence)
    return losses
