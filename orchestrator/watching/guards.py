"""Guards: bounds on a step's metrics, and the action taken when a value exceeds them.

They are checked after a step is learned and before its weights are published or saved.

    warn    writes an event and a console line
    pause   the run waits until the file PAUSED in its folder is deleted
    stop    GuardTripped, exit code 3
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from orchestrator.config.guards import GuardAction, GuardsConfig
from orchestrator.errors import GuardTripped
from orchestrator.run.storage import reading, replacing
from orchestrator.types import Metrics
from orchestrator.watching.telemetry import EVENTS_FILE, Telemetry, read_lines

PAUSED_FILE = "PAUSED"
Act = tuple[str, int, str]  # guard, step, action
SMALLEST_STD = 1e-6  # even a constant reward varies by rounding
REMEDIES: Mapping[str, str] = MappingProxyType(
    {
        "kl": "a higher algorithm.kl_coefficient or a lower policy.learning_rate",
        "entropy": "a higher algorithm.entropy_coefficient or a lower policy.learning_rate",
        "length": "a reward that does not increase with length, or algorithm.truncated=penalise",
        "reward_jump": "a reward that can't be hacked (see the samples in the log)",
        "mismatch": "model.dtype=float32, a lower rl.max_staleness or publish.verify=full",
    }
)


@dataclass(frozen=True)
class Guard:
    """One row of the table.

    Args:
        name: its section under `guards` in the config.
        metric: a name in metrics.METRICS. Steps without the metric pass.
        minimum, maximum: bounds, in the metric's unit. None: no bound.
        window: if given, `maximum` is a distance from the median of the last `window` steps, in standard deviations of
            those steps. Steps with fewer predecessors pass.
    """

    name: str
    metric: str
    action: GuardAction
    minimum: float | None = None
    maximum: float | None = None
    window: int | None = None

    def bounds(self, past: Sequence[float]) -> tuple[float | None, float | None]:
        """Lowest and highest allowed value, given the metric's values of the last `window` steps."""
        if self.window is None or self.maximum is None:
            return self.minimum, self.maximum
        if len(past) < self.window:
            return None, None
        middle, distance = statistics.median(past), self.maximum * max(statistics.pstdev(past), SMALLEST_STD)
        return middle - distance, middle + distance


@dataclass(frozen=True)
class Trip:
    """A violation of a guard. `bound` is the violated bound, the highest (`is_highest`) or lowest allowed value."""

    guard: Guard
    step: int
    value: float
    bound: float
    is_highest: bool

    @property
    def act(self) -> Act:
        return self.guard.name, self.step, self.guard.action

    def __str__(self) -> str:
        guard = self.guard
        key = f"guards.{guard.name}.{'max' if self.is_highest or guard.window else 'min'}"
        limit = f"{'at most' if self.is_highest else 'at least'} {self.bound:.4g}"
        return f"step {self.step}: {guard.metric} is {self.value:.4g}; {key} allows {limit}"


def guard_table(config: GuardsConfig) -> tuple[Guard, ...]:
    """The guards that have a bound."""
    kl, entropy, length, jump = config.kl, config.entropy, config.length, config.reward_jump
    mismatch, failed = config.mismatch, config.failed_rewards
    table = (
        Guard("kl", "kl/per_response", kl.action, maximum=kl.max),
        Guard("entropy", "policy/entropy", entropy.action, minimum=entropy.min),
        Guard("length", "response/length_mean", length.action, minimum=length.min, maximum=length.max),
        Guard("reward_jump", "reward/mean", jump.action, maximum=jump.max, window=jump.window),
        Guard("mismatch", "engine/mismatch", mismatch.action, maximum=mismatch.max),
        Guard("failed_rewards", "reward/failed_fraction", failed.action, maximum=failed.max),
    )
    return tuple(guard for guard in table if guard.minimum is not None or guard.maximum is not None)


def why_paused(run_folder: Path) -> str | None:
    """The content of the file PAUSED. None: not paused."""
    try:
        return (run_folder / PAUSED_FILE).read_text(encoding="utf-8")
    except OSError:
        return None


def only_warning(table: Iterable[Guard]) -> tuple[Guard, ...]:
    return tuple(replace(guard, action="warn") for guard in table)


def acted_before(run_folder: Path) -> set[Act]:
    """Reports of earlier attempts, from their events. They are not repeated when a step is learned again."""
    acted: dict[str, set[Act]] = {}
    for event in read_lines(run_folder / EVENTS_FILE):
        if event["kind"] == "guard":
            acted.setdefault(event["stage"], set()).add((event["guard"], event["step"], event["action"]))
        elif event["kind"] == "stage_set_aside":
            acted.pop(event["stage"], None)
    return set().union(*acted.values())


class Guards:
    """Checks each learned step, whether newly sampled or learned again from the log.

    Args:
        past: metrics of an earlier step's experience from the log, None if the log does not contain the step. Guards
            use only the log, so their decisions are the same after a restart.
        console: gets one line of text per warning and pause.
        acted: reports not to repeat, see `acted_before`.
        poll_s: seconds between checks for the end of a pause.
    """

    def __init__(
        self,
        table: Sequence[Guard],
        *,
        folder: Path,
        telemetry: Telemetry,
        past: Callable[[int], Metrics | None],
        console: Callable[[str], None],
        acted: Iterable[Act] = (),
        poll_s: float = 1.0,
    ) -> None:
        self._table, self._telemetry, self._console = tuple(table), telemetry, console
        self._paused, self._poll_s = folder / PAUSED_FILE, poll_s
        self._acted = set(acted)
        self._past = lru_cache(max((guard.window or 0 for guard in table), default=0))(past)

    async def check(self, step: int, metrics: Metrics) -> None:
        """Warns, then stops or pauses. Returns when the run may continue.

        Raises:
            GuardTripped: a guard with action stop tripped.
            StorageError: an event or the file PAUSED can't be written.
        """
        trips = [trip for guard in self._table if (trip := self._trip(guard, step, metrics))]
        for trip in trips:
            if trip.guard.action == "warn" and self._is_news(trip):
                self._console(f"guard: {trip}")
                self._tell(trip)
        if stops := [trip for trip in trips if trip.guard.action == "stop"]:
            for trip in stops:
                self._tell(trip)
            raise GuardTripped(_refusal(stops))
        if pauses := [trip for trip in trips if trip.guard.action == "pause"]:
            await self._pause(pauses)

    def _trip(self, guard: Guard, step: int, metrics: Metrics) -> Trip | None:
        value = metrics.get(guard.metric)
        if value is None:
            return None
        lower, upper = guard.bounds(self._past_values(guard, step))
        if upper is not None and not value <= upper:  # NaN violates every bound
            return Trip(guard, step, value, upper, is_highest=True)
        if lower is not None and not value >= lower:
            return Trip(guard, step, value, lower, is_highest=False)
        return None

    def _past_values(self, guard: Guard, step: int) -> list[float]:
        steps = range(max(0, step - (guard.window or 0)), step)
        return [metrics[guard.metric] for earlier in steps if (metrics := self._past(earlier))]

    async def _pause(self, trips: Sequence[Trip]) -> None:
        """Waits until the user ends the pause; the only wait without a deadline. A pause that an earlier attempt began
        is over if its file is missing."""
        reasons = "; ".join(map(str, trips))
        if news := [trip for trip in trips if self._is_news(trip)]:
            with replacing(self._paused) as temporary:
                temporary.write_text(_why_paused(reasons), encoding="utf-8")
            for trip in news:
                self._tell(trip)
        if not self._is_paused():
            return
        self._console(f"paused: {reasons}. Delete {self._paused} to continue.")
        while self._is_paused():  # noqa: ASYNC110  a file is the interface that works from any machine
            await asyncio.sleep(self._poll_s)
        self._console("the pause is over; the run continues")
        self._telemetry.event("pause_ended", step=trips[0].step)

    def _is_paused(self) -> bool:
        with reading(self._paused):
            return self._paused.exists()

    def _is_news(self, trip: Trip) -> bool:
        return trip.act not in self._acted

    def _tell(self, trip: Trip) -> None:
        guard = trip.guard
        self._telemetry.event(
            "guard",
            guard=guard.name,
            step=trip.step,
            metric=guard.metric,
            value=trip.value if math.isfinite(trip.value) else None,
            bound=trip.bound,
            action=guard.action,
        )
        self._acted.add(trip.act)


def _refusal(trips: Sequence[Trip]) -> str:
    guards = [trip.guard for trip in trips]
    remedies = ", or ".join(REMEDIES[guard.name] for guard in guards)
    gentler = " ".join(f"guards.{guard.name}.action=warn" for guard in guards)
    return (
        f"{'; '.join(map(str, trips))}. This step's weights were not published or saved; the log and earlier "
        "checkpoints remain. A resume learns the same committed step again and stops here again, unless it has a wider "
        f"bound or {gentler}. Otherwise start a new run with {remedies}."
    )


def _why_paused(reasons: str) -> str:
    return (
        f"The run is paused: {reasons}.\n"
        "The step is learned; its weights are not published or saved yet.\n"
        "Delete this file to continue the run. If the run is stopped and resumed, it pauses at this step again while "
        "this file exists.\n"
    )
