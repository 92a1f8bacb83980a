"""Describes row values for error messages."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any


def field_names(fields: Mapping[str, Any]) -> str:
    """Names of a row's fields, escaped if they are not printable; at most 20 of them."""
    names = [name if len(name) <= 60 else f"{name[:57]}..." for name in islice(fields, 20)]
    more = f" and {len(fields) - 20} more" if len(fields) > 20 else ""
    return (", ".join(names).encode(errors="backslashreplace").decode() or "none") + more


def describe(value: Any) -> str:
    """The JSON type of a value."""
    kinds = {type(None): "null", bool: "true or false", str: "text", dict: "an object", list: "a list"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
