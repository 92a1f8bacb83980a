"""The terminal that commands write to. What they show holds text from outside: prompts, replies, rows, other programs'
lines. It can neither steer the terminal nor carry a credential there.

Nor does a run depend on it: a pipe whose reader has gone, a closed terminal, a full disk and an encoding without the
character at hand lose text, and nothing else.
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
    """Standard output or error, looked up at every call, as print() does. After a failure the rest goes nowhere."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def _stream(self) -> TextIO | None:
        """None where the process was started without it."""
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
        """Lets the descriptor lead to nothing. What the stream still holds would otherwise fail the end of the
        process, and with it the exit code."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, getattr(sys, self._name).fileno())
            os.close(nowhere)


def console(name: str) -> Console:
    """A rich console on "stdout" or "stderr"."""
    return Console(file=Screen(name), highlight=False, soft_wrap=True)  # type: ignore[arg-type]  # rich needs no more
