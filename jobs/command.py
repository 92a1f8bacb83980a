"""The frame of every command: reads the config, and reports errors with one message and the exit code."""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from jobs import stops
from jobs.console import Screen, console
from orchestrator.config.config import Config
from orchestrator.config.loader import load_config, to_yaml
from orchestrator.errors import RlhfError
from orchestrator.garbage import collect_seldom

EXIT_S = 10.0  # for threads and libraries, after a stopped command has printed its last line
UNWIND_S = 60.0  # for ending actors and Ray's processes, once everything is saved

out, err = console("stdout"), console("stderr")


def say(text: str) -> None:
    """Prints one line, without delay even when standard output is a file."""
    out.print(escape(text))
    out.file.flush()


def read_config(path: Path | None, overrides: Iterable[str], *, print_config: bool) -> Config:
    """The config of a command line; with `print_config` prints it and ends the command."""
    config = load_config(path, overrides)
    imported("jobs.stages.table:stages_of")(config)  # raises if the stages are wrong
    if print_config:
        out.print(to_yaml(config), markup=False)
        raise typer.Exit(0)
    return config


def imported(name: str) -> Callable[..., Any]:
    """The function at `module:function`, imported on this call. The libraries of a job take seconds to import, and an
    error in its config should be reported before that."""
    module, _, function = name.partition(":")
    with stops.ending_at_once():
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def run_command(work: Callable[[], None]) -> None:
    """Runs a command's work. An RlhfError becomes one message and its exit code; a stop (stops.py) becomes 130."""
    logging.basicConfig(level=logging.WARNING, stream=Screen("stderr"))
    stops.interrupt()
    try:
        work()
    except RlhfError as error:
        err.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}")
        raise typer.Exit(error.exit_code) from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        stops.end_within(EXIT_S)
        err.print(stops.STOPPED)
        raise typer.Exit(stops.INTERRUPTED) from None


def run_async(work: Coroutine[Any, Any, None], *, grace_s: float) -> None:
    """Runs a coroutine. A stop cancels it, so that it can save its state and clean up.

    Args:
        grace_s: time for saving. The process ends at most UNWIND_S after that.
    """
    stop = stops.Cancelling(grace_s + UNWIND_S)

    async def supervised() -> None:
        task = asyncio.ensure_future(work)
        stop.begin(task)
        await task

    collect_seldom()
    with stop.listening():
        asyncio.run(supervised())
