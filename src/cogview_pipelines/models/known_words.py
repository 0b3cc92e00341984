"""The words that a model was trained on, where those are few, and which words of a text are not among them."""

import re
import unicodedata
from collections.abc import Iterable

# Chinese characters stand without spaces: there words are those known ones that leave the fewest characters.
_CHINESE = "\u3400-\u9fff\uf900-\ufaff"
_MARKS = ",;:.!?\uff0c\uff1b\uff1a\uff01\uff1f\u3001\u3002"
# What hangs in the air where a word is gone.
_HANGING = re.compile(r"(?<!\w)[-\u2013\u2014'\u2019&+/|=]+|[-\u2013\u2014'\u2019&+/|=]+(?!\w)")
_MARK = re.compile(rf"\s*([{_MARKS}])(?:\s*[{_MARKS}])*")  # several, with nothing between them any more
_END = re.compile(rf"^[{_MARKS}\s]+|[,;:\uff0c\uff1b\uff1a\u3001\s]+$")
# What stands in angle brackets is a word of its own: learned words are mostly called so.
_WORD = re.compile(rf"[<\uff1c][^<>\uff1c\uff1e\s]+[>\uff1e]|[{_CHINESE}]+|(?:(?![{_CHINESE}])[^\W_])+")


class KnownWords:
    """
    A list of words in any language.

    Args:
        words (iterable of `str`): Capitals, full-width letters and what is no letter or digit make no difference.
    """

    def __init__(self, words: Iterable[str]):
        self._words = {run for word in words for run in _runs(word)}
        chinese = sorted((word for word in self._words if _is_chinese(word)), key=len, reverse=True)
        self._longest = len(chinese[0]) if chinese else 0
        self._chinese = re.compile("|".join(map(re.escape, chinese)) or r"(?!)")

    def unknown(self, text: str) -> list[str]:
        """The words of a text that are not in the list, each once, in order; of Chinese, what known ones leave."""
        found = {}
        for run in _runs(text):
            parts = self._left(run) if _is_chinese(run) else [run] if run not in self._words else []
            found.update(dict.fromkeys(parts))
        return list(found)

    def without(self, text: str, words: set[str]) -> str:
        """
        A text without some of its [`unknown`][KnownWords.unknown] words, and without the punctuation that was around
        them.
        """

        def kept(match: re.Match[str]) -> str:
            run = match.group()
            if _is_chinese(run):
                cut = self._cut(unicodedata.normalize("NFKC", run))
                return "".join(part for part, is_known in cut if is_known or part not in words)
            return "" if words.issuperset(_runs(run)) else run

        text = _WORD.sub(kept, text)
        text = _MARK.sub(r"\1", _HANGING.sub(" ", text))
        return _END.sub("", " ".join(text.split()))

    def _left(self, run: str) -> list[str]:
        """What is between the known words of a run of Chinese."""
        return [part for part, is_known in self._cut(run) if not is_known]

    def _cut(self, run: str) -> list[tuple[str, bool]]:
        """Known words of a run of Chinese, chosen so that least is between them, and what is between them."""
        if not any(self._chinese.split(run)):  # the longest words, from the left, mostly leave nothing
            return [(run, True)]
        least = [0] * (len(run) + 1)  # characters that are left from each place on
        steps = [0] * len(run)  # length of the word that begins at each place, or 0
        for at in reversed(range(len(run))):
            least[at] = least[at + 1] + 1
            for end in range(at + 1, min(at + self._longest, len(run)) + 1):
                if least[end] <= least[at] and run[at:end] in self._words:  # of equal ones the longest
                    least[at], steps[at] = least[end], end - at
        parts, at, start = [], 0, 0
        while at < len(run):
            if steps[at]:
                parts += [(run[start:at], False), (run[at : at + steps[at]], True)]
                start = at + steps[at]
            at += steps[at] or 1
        return [(part, is_known) for part, is_known in (*parts, (run[start:], False)) if part]


def has_chinese(text: str) -> bool:
    """Whether there is a Chinese character in a text."""
    return re.search(f"[{_CHINESE}]", text) is not None


def _runs(text: str) -> list[str]:
    """Words of scripts with spaces, and runs of Chinese characters."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _is_chinese(run: str) -> bool:
    return re.match(f"[{_CHINESE}]", run) is not None
