"""The terminal that commands write to. What they show holds text from outside: prompts, replies, rows, other programs'
lines. It can neither steer the terminal nor carry a credential there."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from rich.console import Console

from orchestrator.outside_text import printable, redacted


class Screen:
    """Standard output or error, looked up at every call, as print() does."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def _stream(self) -> TextIO:
        stream: TextIO = getattr(sys, self._name)
        return stream

    def write(self, text: str) -> int:
        return self._stream.write(printable(redacted(text)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def console(name: str) -> Console:
    """A rich console on "stdout" or "stderr"."""
    return Console(file=Screen(name), highlight=False, soft_wrap=True)  # type: ignore[arg-type]  # rich needs no more
