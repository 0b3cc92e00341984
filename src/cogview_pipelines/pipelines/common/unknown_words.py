"""What users are told of words that a model does not know: the same by pipelines, commands and servers."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizer

MOST_PARTS, LONGEST_PART = 8, 20  # that are shown of a text, and of each the letters
# What becomes of texts that hold such words: of those that are drawn, or are scored with all of them.
MESSAGES = {
    "rest": "The model does not know this part of {name}, and goes by the rest: {parts}",
    "nothing": "The model knows nothing of {name}: {parts}",
    "score": "The model does not know this part of {name}, so its share in the score says little: {parts}",
}


def find_unknown(
    tokenizer: PreTrainedTokenizer,
    texts: Iterable[str],
    scored_by: str | None = None,
    told: set[str] | None = None,
) -> dict[str, list[str]]:
    """
    What a model does not know of texts, each part once: by a key of [`MESSAGES`], the parts.

    Args:
        tokenizer ([`CodesAndPiecesTokenizer`]): Of the model.
        texts (iterable of `str`): The texts.
        scored_by (`str`, *optional*): The component that scores them; without, they are drawn.
        told (`set`, *optional*): Parts that were told before, and are left out; those that are found are added.
    """
    told = set() if told is None else told
    found: dict[str, list[str]] = {}
    for text in texts:
        parts = tokenizer.unknown_parts(text) if scored_by is None else tokenizer.unknown_parts(text, scored_by)
        parts = [part for part in parts if part not in told]
        told.update(parts)
        if parts:
            kind = "score" if scored_by is not None else "rest" if tokenizer.knows_some(text) else "nothing"
            found.setdefault(kind, []).extend(parts)
    return found


def show(parts: Sequence[str]) -> str:
    """The first parts of a text in a line, each shortened."""
    shown = [part if len(part) <= LONGEST_PART else f"{part[:LONGEST_PART]}…" for part in parts[:MOST_PARTS]]
    return ", ".join(shown) + (", …" if len(parts) > MOST_PARTS else "")


def messages(found: dict[str, list[str]], name: str) -> list[str]:
    """What is told of what [`find_unknown`] found in texts that are called `name`."""
    return [MESSAGES[kind].format(name=name, parts=show(parts)) for kind, parts in found.items()]
