"""A tracker on a separate thread: a tracker that blocks, fails or is absent never blocks or ends a run.

Metrics that it did not accept are queued and sent when it answers again. metrics.jsonl always contains all metrics.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic

from orchestrator.roles import Trackers

Item = tuple[int, Mapping[str, float]]

MOST_WAITING = 20_000
SLOW_S = 60.0
CLOSE_S = 15.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_CLOSE_FAILING_S = 2.0
_MOST_REFUSALS = 3


class BackgroundTracker:
    """Args:
    name: name in messages.
    start: opens the tracker, given its first step; called again after a failure.
    tell: gets a line when the tracker fails or is slow, and one when it has caught up.
    most_waiting: maximum length of the queue, beyond which the oldest entries are dropped.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[int], Trackers],
        tell: Callable[[str], None],
        *,
        most_waiting: int = MOST_WAITING,
        slow_s: float = SLOW_S,
        close_s: float = CLOSE_S,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._name, self._start, self._tell = name, start, tell
        self._slow_s, self._close_s, self._first_pause_s = slow_s, close_s, first_pause_s
        self._waiting: deque[Item] = deque(maxlen=most_waiting)
        self._num_lost = 0
        self._tracker: Trackers | None = None
        self._is_told = False
        self._num_refused = 0
        """Number of times that an open tracker refused the next item."""
        self._since: float | None = None
        """Start time of the pending call, to the tracker or to open it."""
        self._closing = threading.Event()
        self._changed = threading.Condition()
        # A daemon: a call that never returns does not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends metrics to the queue without blocking."""
        with self._changed:
            self._num_lost += len(self._waiting) == self._waiting.maxlen
            self._waiting.append((step, dict(metrics)))
            self._changed.notify()
            since = self._since
        if since is not None and monotonic() - since > self._slow_s:
            self._tell_once(f"has not answered for {monotonic() - since:.0f} s")

    def close(self) -> None:
        """Waits briefly for the queue to empty, and reports what is left."""
        self._closing.set()
        with self._changed:
            self._changed.notify()
        self._thread.join(_CLOSE_FAILING_S if self._is_told else self._close_s)
        num_left = len(self._waiting) + self._num_lost
        if num_left:
            self._tell(f"{self._name}: {num_left} lines of metrics were not sent; metrics.jsonl holds them all")
        elif self._thread.is_alive():
            self._tell(f"{self._name}: did not close in time; metrics.jsonl holds all metrics")

    def _run(self) -> None:
        pause_s = self._first_pause_s
        while (item := self._next()) is not None:
            try:
                self._since = monotonic()
                self._send(item)
            except BaseException as error:  # noqa: BLE001  the tracker's library may raise anything, SystemExit too
                self._tracker = None
                self._tell_once(f"{type(error).__name__}: {str(error)[:300]}")
                self._since = None
                if self._num_refused >= _MOST_REFUSALS:  # it answers but rejects this one
                    self._num_lost += 1
                    self._drop(item)
                if self._closing.wait(pause_s):
                    return
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                self._since, pause_s = None, self._first_pause_s
                self._drop(item)
                self._tell_caught_up()
        self._close_tracker()

    def _next(self) -> Item | None:
        """Waits for the oldest entry. None: the queue is empty and closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
            return self._waiting[0] if self._waiting else None

    def _drop(self, item: Item) -> None:
        self._num_refused = 0
        with self._changed:
            if self._waiting and self._waiting[0] is item:  # it may have been dropped
                self._waiting.popleft()

    def _send(self, item: Item) -> None:
        step, metrics = item
        if self._tracker is None:
            self._tracker = self._start(step)
        self._num_refused += 1
        self._tracker.log(step, metrics)

    def _close_tracker(self) -> None:
        try:
            if self._tracker is not None:
                self._tracker.close()
        except BaseException as error:  # noqa: BLE001  as above
            self._tell_once(f"{type(error).__name__}: {str(error)[:300]}")

    def _tell_once(self, what: str) -> None:
        if self._is_told or self._closing.is_set():  # `close` reports what is left
            return
        self._is_told = True
        self._tell(
            f"{self._name}: {what}. The run continues; metrics.jsonl holds all metrics, and those that {self._name} "
            "misses are sent when it answers."
        )

    def _tell_caught_up(self) -> None:
        if self._is_told and not self._waiting:
            self._is_told = False
            lost = f" but for {self._num_lost} lines" if self._num_lost else ""
            self._tell(f"{self._name}: answers again and has all metrics{lost}")
