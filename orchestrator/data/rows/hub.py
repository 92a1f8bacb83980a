"""Data sets of the Hugging Face hub by name, `datasets:NAME[:CONFIG]:SPLIT`, streamed by the package `datasets`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from orchestrator.data.rows.json_rows import Row
from orchestrator.data.rows.parquet_decoder import plain
from orchestrator.errors import DataError

_PREFIX = "datasets:"


def is_hub(name: str) -> bool:
    return name.startswith(_PREFIX)


def hub_rows(name: str) -> Iterator[Row]:
    """Yields the rows of a split. Values that JSON does not support become text.

    Raises:
        DataError: the package is not installed, or can't load the data set.
    """
    parts = name.removeprefix(_PREFIX).split(":")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise DataError(f"{name} must be datasets:NAME:SPLIT or datasets:NAME:CONFIG:SPLIT.")
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"{name} needs the package `datasets`, which is not installed: pip install datasets, or give a file."
        ) from None
    try:
        rows = library.load_dataset(*parts[:-1], split=parts[-1], streaming=True)
        for number, fields in enumerate(rows, 1):
            yield Row(number, plain(fields))
    except Exception as error:  # the package raises errors of many libraries
        raise DataError(f"{name} can't be loaded: {type(error).__name__}: {error}") from error
