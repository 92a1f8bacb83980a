"""An asyncio event loop whose clock jumps: every sleep ends at once, and exactly on time."""

from __future__ import annotations

import asyncio
import selectors

_REAL_WAIT_S = 10.0


class _JumpingSelector(selectors.DefaultSelector):
    """Waits in no time for what is due at a time; for anything else as any selector, but not for ever."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None:
            self.now += max(timeout, 0.0)
            return super().select(0)
        ready = super().select(_REAL_WAIT_S)
        if not ready:
            raise RuntimeError("the simulation waits for something that nobody will do")
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s. What is awaited must be timers and other tasks: threads and sockets know no virtual time."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now
