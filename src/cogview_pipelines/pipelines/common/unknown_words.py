"""What users are told of words that a model does not know: the same by pipelines, commands and servers."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizer

MOST_PARTS, LONGEST_PART = 8, 20  # that are shown of a text, and of each the letters
# What becomes of a text that holds such words.
MESSAGES = {
    "rest": "The model does not know this part of {name}, and goes by the rest: {parts}",
    "nothing": "The model knows nothing of {name}: {parts}",
    "score": "The model does not know this part of {name}, so its share in the score says little: {parts}",
}


def outcome(tokenizer: PreTrainedTokenizer, text: str, scored: bool = False) -> str:
    """Which of [`MESSAGES`] is true of a text with unknown parts: one that is drawn, or is scored with all of them."""
    if scored:
        return "score"
    return "rest" if tokenizer.knows_some(text) else "nothing"


def show(parts: Sequence[str]) -> str:
    """The first parts of a text in a line, each shortened."""
    shown = [part if len(part) <= LONGEST_PART else f"{part[:LONGEST_PART]}…" for part in parts[:MOST_PARTS]]
    return ", ".join(shown) + (", …" if len(parts) > MOST_PARTS else "")


def message(tokenizer: PreTrainedTokenizer, text: str, name: str, scored: bool = False) -> str:
    """
    What is told of a text; empty if the model knows all of it.

    Args:
        tokenizer ([`CodesAndPiecesTokenizer`]): Of the model.
        text (`str`): The text.
        name (`str`): What the message calls it.
        scored (`bool`): Whether it is scored, with all of its words, rather than drawn, without those.
    """
    parts = tokenizer.unknown_parts(text)
    return MESSAGES[outcome(tokenizer, text, scored)].format(name=name, parts=show(parts)) if parts else ""
