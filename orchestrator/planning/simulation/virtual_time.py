"""An asyncio event loop with virtual time: each sleep ends immediately, at exactly its due time."""

from __future__ import annotations

import asyncio
import selectors

_REAL_WAIT_S = 10.0


class _JumpingSelector(selectors.DefaultSelector):
    """Advances the clock instead of waiting for timers. Waits for other events in real time, with a limit."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None:
            self.now += max(timeout, 0.0)
            return super().select(0)
        ready = super().select(_REAL_WAIT_S)
        if not ready:
            raise RuntimeError("the simulation waits for an event that never happens")
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s. Await only timers and tasks: threads and sockets do not follow virtual time."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now
