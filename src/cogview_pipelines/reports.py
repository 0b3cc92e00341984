"""What programs say to a console, which may lack letters or be closed."""

import contextlib
import os
import sys
from typing import Any


class Reports:
    """
    A text stream whose failures stop no work: letters that it cannot show become escapes, and once nobody reads it any
    more, what is written to it is dropped.
    """

    def __init__(self, stream):
        self._stream, self.is_closed = stream, False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text), lambda: self._stream.write(self._shown(text)))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _shown(self, text: str) -> str:
        encoding = self._stream.encoding or "ascii"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _try(self, act, other=None) -> None:
        if self.is_closed:
            return
        try:
            act()
        except UnicodeEncodeError:
            if other is not None:
                self._try(other)
        except (OSError, ValueError):  # a pipe that was closed, or the stream itself
            self.is_closed = True
            with contextlib.suppress(OSError, ValueError, AttributeError):  # what is in its buffer goes nowhere
                number = self._stream.fileno()
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """From here on, an error while printing never stops the work, whether this package prints or a library."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Reports):
            setattr(sys, name, Reports(stream))
