"""The kind of a file: given by the user, or detected from the fields of its first rows."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from orchestrator.data.kinds import KINDS
from orchestrator.data.mixtures import is_mixture, sources_of
from orchestrator.data.rows.files import is_text, read_rows
from orchestrator.errors import DataError

_FIRST_ROWS = 20
_SCORES = frozenset({"score", "rating", "stars", "helpfulness", "completions"})


def kinds_of(path: Path, named: str | None) -> list[str]:
    """Names of KINDS as which a file can be read, the likeliest first.

    Raises:
        DataError: an unknown name, or fields that fit no format.
    """
    if named is not None:
        if named not in KINDS:
            raise DataError(f"--as {named} is not known; choose one of {', '.join(KINDS)}.")
        return [named]
    if is_mixture(path):
        return kinds_of(sources_of(path)[0].path, None)
    if is_text(path):
        return ["documents"]
    fields: set[str] = set()
    try:
        for row in islice(read_rows(path), _FIRST_ROWS):
            fields.update(row.fields)
    except DataError:
        if not fields:
            raise
    found = [
        name
        for name, kind in KINDS.items()
        if any(needed <= fields for form in kind.formats.values() for needed in form.fields)
        and (name != "scores" or fields & _SCORES)
    ]
    if not found:
        names = ", ".join(sorted(fields)[:20]) or "none"
        raise DataError(
            f"{path}: its fields ({names}) fit no known format; docs/data.md lists them. Rename the fields."
        )
    return found
