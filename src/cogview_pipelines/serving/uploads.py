"""The body of a request while it arrives."""

import asyncio
import time

from .errors import ApiError


class Upload:
    """
    How a body arrives. One that has had its time may lose its place in the queue, so that slow ones keep nobody out.

    Args:
        timeout (`float`): Seconds in which it must have arrived.
        grace (`float`): Seconds for which its place is safe.
    """

    def __init__(self, timeout: float, grace: float):
        self.timeout, self.grace = timeout, grace
        self.received = 0
        self.is_complete = False
        self._began = time.monotonic()
        self._evicted = asyncio.Event()

    @property
    def remaining(self) -> float:
        """Seconds that are left."""
        return max(self._began + self.timeout - time.monotonic(), 0.0)

    @property
    def rate(self) -> float:
        """Bytes per second so far."""
        return self.received / max(time.monotonic() - self._began, 1e-3)

    @property
    def may_be_evicted(self) -> bool:
        """Whether it has had its time and is not there yet."""
        return not self.is_complete and time.monotonic() > self._began + self.grace

    def evict(self) -> None:
        """End it: somebody else has its place."""
        self._evicted.set()

    def check(self) -> None:
        """
        Raises:
            ApiError: If it was evicted.
        """
        if self._evicted.is_set():
            message = "The body of the request came slowly, and others were waiting for its place. Try again."
            raise ApiError(408, message, "body_timeout", retry_after=1)

    async def wait_for(self, receiving) -> dict:
        """
        The next message of the body.

        Raises:
            ApiError: If the time is over, or it was evicted.
        """
        message = asyncio.ensure_future(receiving)
        evicted = asyncio.ensure_future(self._evicted.wait())
        try:
            await asyncio.wait({message, evicted}, timeout=self.remaining, return_when=asyncio.FIRST_COMPLETED)
            self.check()
            if not message.done():
                raise ApiError(408, f"The body of the request did not arrive in {self.timeout:g} s.", "body_timeout")
            return message.result()
        finally:
            message.cancel()
            evicted.cancel()
