"""SIGTERM and Ctrl-C end a run after the step that is being computed, with a checkpoint."""

import signal
import threading


class Interruption:
    """
    While this context is entered, the first SIGTERM or SIGINT is noted instead of ending the process; the second one
    acts as it did before.

    Attributes:
        signal (`str`, *optional*): The name of the signal that came, such as `"SIGTERM"`.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal: str | None = None
        self._before = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number, frame) -> None:
        self.signal = signal.Signals(number).name
        for each, handler in self._before.items():
            signal.signal(each, handler)
