"""What every command does around its work: read the config, tell the truth in one message and by the exit code."""

from __future__ import annotations

import asyncio
import importlib
import logging
import signal
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from jobs.console import Screen, console
from orchestrator.config import Config, load_config, to_yaml
from orchestrator.errors import RlhfError
from orchestrator.garbage import collect_seldom

INTERRUPTED = 130  # what shells report of a program ended by Ctrl-C

out, err = console("stdout"), console("stderr")


def say(text: str) -> None:
    """One line for people, at once also when standard output is a file."""
    out.print(escape(text))
    out.file.flush()


def read_config(path: Path | None, overrides: Iterable[str], *, print_config: bool) -> Config:
    """The config of a command line; with `print_config` it is printed and the command ends."""
    config = load_config(path, overrides)
    if print_config:
        out.print(to_yaml(config), markup=False)
        raise typer.Exit(0)
    return config


def imported(name: str) -> Callable[..., Any]:
    """The function at `module:function`, imported now. The libraries behind a job take seconds to import, and a typo in
    its config is to be told at once."""
    module, _, function = name.partition(":")
    with _signals_later():
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


@contextmanager
def _signals_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the body: an interrupted import surfaces as all kinds of errors."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def run_command(work: Callable[[], None]) -> None:
    """Runs a command's work; errors of our own become one message and their exit code, SIGTERM is as Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, stream=Screen("stderr"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work()
    except RlhfError as error:
        err.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}")
        raise typer.Exit(error.exit_code) from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        err.print("stopped; what was committed is safe, and the same run.id goes on from there.")
        raise typer.Exit(INTERRUPTED) from None


def run_async(work: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine; Ctrl-C and SIGTERM cancel it, so that it can end what it started."""

    async def supervised() -> None:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        await task

    collect_seldom()
    asyncio.run(supervised())
