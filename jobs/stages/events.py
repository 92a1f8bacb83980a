"""Events of a stage's start and end, of whatever kind, from which `why` and the report derive how a run ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.errors import StorageError
from orchestrator.run.checkpoints import complete_checkpoints
from orchestrator.watching.telemetry import Telemetry


@contextmanager
def stage_events(telemetry: Telemetry, stages: Sequence[str], checkpoints: Path) -> Iterator[None]:
    """Around the work of one stage.

    Args:
        stages: all stages of this attempt. A run can get more stages later.
        checkpoints: folder of the run's checkpoints, which may not exist.
    """
    telemetry.event("stage_started", stages=list(stages))
    try:
        yield
    except asyncio.CancelledError:
        with suppress(StorageError):
            saved = complete_checkpoints(checkpoints)
            telemetry.event("stop_requested", step=telemetry.now()["step"], saved=saved[-1].name if saved else None)
        raise
    except BaseException as error:
        with suppress(StorageError):  # on a full disk the first error is the one to report
            telemetry.event("stage_failed", error=f"{type(error).__name__}: {error}")
        raise
    telemetry.event("stage_finished")
