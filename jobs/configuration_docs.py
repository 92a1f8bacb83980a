"""`python -m jobs.configuration_docs`: writes docs/configuration.md from the descriptions in orchestrator/config/."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jobs.command import say
from orchestrator.config.base import ByName, by_name, by_name_in_mapping
from orchestrator.config.config import Config
from orchestrator.config.described import description_of

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

HEAD = """# Configuration

`make docs` generates this page from `orchestrator/config/`; a test compares both.

A config is a YAML file with the sections below; keys that it leaves out have their defaults. On the command line every
key can be set as `section.key=value`, with the value in YAML: `rlhf run --config FILE rl.steps=10 reward.name=rules`.
Unknown keys are refused; the error suggests the nearest known key. `--print-config` prints the resolved config; a run
keeps it in its folder.
"""


def configuration_markdown() -> str:
    """The text of docs/configuration.md: a table per section, in the order of the config."""
    return "\n".join([HEAD, *_tables("", Config)])


def _tables(prefix: str, section: type[BaseModel]) -> Iterator[str]:
    yield from _keys(section, prefix, f"## `{prefix}`" if prefix else "## At the top", section.model_fields)


def _keys(
    section: type[BaseModel], prefix: str, heading: str, fields: Mapping[str, FieldInfo], *rows: str
) -> Iterator[str]:
    """Of these fields of a section: a table of the keys that hold values, after `rows`; then the tables of those that
    hold sections."""
    nested = {name: inner for name, field in fields.items() if (inner := _section_in(field.annotation))}
    plain = {name: field for name, field in fields.items() if name not in nested}
    if heading and (plain or rows):
        yield f"{heading}\n"
    if plain or rows:
        yield "| key | type | default | meaning |\n|---|---|---|---|"
        yield from rows
        for name, field in plain.items():
            text = _cell(description_of(section, name))
            yield f"| `{name}` | {_cell(_type_text(field))} | {_default(field)} | {text} |"
        yield ""
    for name, inner in nested.items():
        repeated = typing.get_origin(fields[name].annotation) is tuple
        path = f"{prefix}.{name}".strip(".") + ("[]" if repeated else "")
        choice = by_name(fields[name])
        if (named := by_name_in_mapping(fields[name])) is not None:
            heading = f"## `{path}.NAME`\n\n{_cell(description_of(section, name))}"
            yield from _keys(inner, f"{path}.NAME", heading, _without_name(inner), _name_row(named))
            continue
        yield from _tables(path, inner) if choice is None else _choice(path, choice, inner)


def _choice(path: str, choice: ByName, shared: type[BaseModel]) -> Iterator[str]:
    """The keys that all sections of a choice have, then those that each adds."""
    row = _name_row(choice, "The keys below under its name are legal too, and no others.")
    yield from _keys(shared, path, f"## `{path}`", _without_name(shared), row)
    for name, section in choice.table.items():
        yield f"### `{path}`, name: `{name}`\n\n{_cell(' '.join((section.__doc__ or '').split()))}\n"
        changed = [
            f"`{key}` {_default(field)}"
            for key, field in section.model_fields.items()
            if key != "name" and key in shared.model_fields and field.default != shared.model_fields[key].default
        ]
        if changed:
            yield f"Its own defaults: {', '.join(changed)}.\n"
        own = {key: field for key, field in section.model_fields.items() if key not in shared.model_fields}
        yield from _keys(section, path, "", own)


def _without_name(section: type[BaseModel]) -> dict[str, FieldInfo]:
    return {name: field for name, field in section.model_fields.items() if name != "name"}


def _name_row(choice: ByName, text: str = "Its own keys in `reward` are legal too, and no others.") -> str:
    names = " or ".join(f"`{name}`" for name in choice.table)
    return f"| `name` | {names} | `{choice.default}` | {text} |"


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds: the section, null, or a list of it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section_in(inner) for inner in typing.get_args(annotation))
    return next((inner for inner in found if inner), None)


def _type_text(field: FieldInfo) -> str:
    text = _name(field.annotation)
    bounds = [f"{sign} {getattr(item, key):g}" for item in field.metadata for key, sign in _SIGNS if hasattr(item, key)]
    patterns = [f"`{item.pattern}`" for item in field.metadata if getattr(item, "pattern", None)]
    return ", ".join([text, *bounds, *patterns])


_SIGNS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", types.NoneType: "null"}


def _name(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin is typing.Annotated:
        limits = [f"{sign} {getattr(item, key):g}" for extra in inner[1:] for item in _constraints(extra)
                  for key, sign in _SIGNS if getattr(item, key, None) is not None]  # fmt: skip
        return " ".join([_name(inner[0]), *limits])
    if origin is tuple:
        return "list of " + _name(inner[0])
    if inner:
        return " or ".join(map(_name, inner))
    return _NAMES.get(annotation, str(annotation))


def _constraints(extra: Any) -> list[Any]:
    return list(extra.metadata) if isinstance(extra, FieldInfo) else [extra]


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(configuration_markdown(), encoding="utf-8")
    say(f"wrote {TARGET}")
