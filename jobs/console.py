"""The terminal that commands write to. Output contains text from outside: prompts, replies, rows, lines of other
programs. Such text can neither control the terminal nor show a credential.

A run does not depend on its output: a pipe without a reader, a closed terminal, a full disk or an encoding without a
character lose text, but never stop the run.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console

from orchestrator.data.outside_text import printable, redacted


class Screen:
    """Standard output or error, looked up at every call, as print() does. After a failure further output is
    discarded."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def _stream(self) -> TextIO | None:
        """None if the process was started without it."""
        stream: TextIO | None = getattr(sys, self._name)
        return stream

    def write(self, text: str) -> int:
        stream = self._stream
        if stream is not None:
            shown = printable(redacted(text))
            try:
                stream.write(shown)
            except UnicodeEncodeError:
                encoding = stream.encoding or "ascii"
                self._attempt(stream.write, shown.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError):
                self._give_up()
        return len(text)

    def flush(self) -> None:
        stream = self._stream
        if stream is not None:
            self._attempt(stream.flush)

    def __getattr__(self, name: str) -> Any:
        stream = self._stream
        if stream is None and name == "isatty":
            return lambda: False
        return getattr(stream, name)

    def _attempt(self, call: Callable[..., object], *args: Any) -> None:
        try:
            call(*args)
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """Redirects the descriptor to /dev/null. Otherwise flushing the stream would fail at the end of the process,
        and change its exit code."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, getattr(sys, self._name).fileno())
            os.close(nowhere)


def console(name: str) -> Console:
    """A rich console on "stdout" or "stderr"."""
    return Console(file=Screen(name), highlight=False, soft_wrap=True)  # type: ignore[arg-type]  # rich needs no more
