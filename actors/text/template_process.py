"""Renders chat templates in a separate process. actors/text/templates.py starts it and exchanges lines of JSON with it.

A template is code that comes with a model: it may loop forever or ask for all memory. This process limits its CPU time
and memory. Otherwise a template may do what transformers' renderer allows (the same sandbox, options, filters and
functions), with two exceptions: its date is given, and it must not use random numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 2.0  # for one conversation; real templates take milliseconds
MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 16 << 20


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's text for loss masks: renders its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2 reads it as a set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _at_random(*_: Any, **__: Any) -> None:
    raise ValueError("it draws at random (random, lipsum), so no two renderings would be the same")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.filters["random"] = _at_random
    environment.globals["lipsum"] = _at_random
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def render(template: str, today: str, variables: dict[str, Any]) -> str:
    """The rendered text. Raises the template's errors, and OverflowError if the text is too long."""
    now = datetime.fromisoformat(today)
    pieces, length = [], 0
    for piece in _compiled(template).generate(variables, strftime_now=now.strftime):
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise OverflowError(f"it writes more than {MAX_CHARACTERS:,} characters for one conversation")
        pieces.append(piece)
    return "".join(pieces)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"text": ...}, or {"error": ..., "refused": whether the template itself refused}."""
    try:
        return {"text": render(request["template"], request["today"], request["variables"])}
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}", "refused": False}
    except TemplateError as error:
        return {"error": str(error), "refused": type(error) is TemplateError}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB", "refused": False}
    except Exception as error:  # noqa: BLE001  a template is foreign code and may raise anything
        return {"error": f"{type(error).__name__}: {error}", "refused": False}


def main() -> None:
    with contextlib.suppress(OSError, ValueError):  # macOS has the limit and refuses to set it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # only answers are written to the pipe
        for line in sys.stdin.buffer:
            # The timer's signal ends the process, also in the middle of a single long operation.
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            written = json.dumps(answer(json.loads(line))).encode("ascii")
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            answers.write(written + b"\n")
            answers.flush()


if __name__ == "__main__":
    main()
