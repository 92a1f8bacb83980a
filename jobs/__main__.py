"""`python -m jobs COMMAND`, installed as `rlhf COMMAND`: all commands (commands.py), each imported when it is given."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from jobs import stops
from jobs.commands import COMMANDS, PROGRAM

_WIDTH = 100


def command_of(name: str) -> Any:
    """The real command: imports its module, which takes seconds for some."""
    entry = COMMANDS[name]
    module, _, function = entry.place.partition(":")
    with stops.ending_at_once():
        work = getattr(importlib.import_module(module), function)
    example = f"\b\nExample:\n  {PROGRAM} {name} {entry.example}"
    if isinstance(work, typer.Typer):  # a command with commands of its own
        group = typer.main.get_group(work)
        group.epilog = example
        return group
    program = typer.Typer(add_completion=False, rich_markup_mode=None)
    program.command(name, epilog=example, context_settings={"max_content_width": _WIDTH})(work)
    return typer.main.get_command(program)


class _Listed(TyperCommand):
    """A placeholder for a command, so that the list of commands and their completion import none of them."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return command_of(str(self.name)).make_context(info_name, args, parent=parent, **extra)


class _Commands(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, entry in COMMANDS.items():
            self.add_command(_Listed(name, help=entry.summary, rich_markup_mode=None))

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002  typer's signature
        return list(COMMANDS)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"max_content_width": _WIDTH},
)


@app.callback()
def _root() -> None:
    """RLHF on a Ray cluster, by one YAML file (--config) and section.key=value. rlhf COMMAND --help shows the
    options of a command and an example."""


def main() -> None:
    app(prog_name=PROGRAM)


if __name__ == "__main__":
    main()
