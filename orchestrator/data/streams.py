"""Streams the records of a file. Memory holds one row, and 8 to 24 bytes per record for its digest.

A bad row (not JSON, a missing field, a wrong type) is an error that names file, row, fault and remedy; one message
lists up to MAX_BAD_ROWS. A well-formed row that adds nothing (a repeated prompt, chosen equal to rejected: the
published hh-rlhf files have a few) is left out and counted in the report.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Generic

from orchestrator.data.digests import Digests
from orchestrator.data.formats.documents import PLAIN
from orchestrator.data.formats.format import LeftOut
from orchestrator.data.kinds import Kind, New, Record, given_id
from orchestrator.data.limits import check_share
from orchestrator.data.messages import BadRow
from orchestrator.data.records import ReadReport
from orchestrator.data.rows.files import is_text, read_rows, read_text
from orchestrator.data.rows.json_rows import Row
from orchestrator.data.values import field_names
from orchestrator.errors import DataError

MAX_BAD_ROWS = 5
KEPT_BAD_ROWS = 20
DUPLICATE = "already read"


class Stream(Generic[Record]):
    """The distinct records of a file. Iterate once, then ask for the report.

    Args:
        kind: kind of the records.
        format: a name in `kind.formats`, or auto.
        limit: maximum number of records.
        max_bad_rows: number of bad rows after which reading stops. None: never; the first KEPT_BAD_ROWS are kept.
        seen: digests of records that were read before, from other files.

    Raises:
        DataError: during reading: the file can't be read, has bad rows or no records.
    """

    def __init__(
        self,
        kind: Kind[Record],
        path: str | Path,
        format: str = "auto",
        limit: int | None = None,
        *,
        max_bad_rows: int | None = MAX_BAD_ROWS,
        seen: Digests | None = None,
    ) -> None:
        self._key = f"{kind.section}.format"
        if format != "auto" and format not in kind.formats:
            raise DataError(f"{self._key}={format!r} is unknown; choose one of auto, {', '.join(kind.formats)}.")
        self.format = format
        self.left_out: Counter[str] = Counter()
        self.bad_rows: list[str] = []
        self.num_rows = self.num_records = self.num_bad = 0
        self._kind, self._path, self._limit, self._max_bad_rows = kind, str(path), limit, max_bad_rows
        self._seen, self._ids = Digests() if seen is None else seen, Digests()

    def __iter__(self) -> Iterator[Record]:
        for row in self._rows():
            for record in self._records(row):
                self.num_records += 1
                yield record
                if self.num_records == self._limit:
                    return

    def report(self) -> ReadReport:
        """The report after reading. Raises DataError if there were bad rows."""
        if self.bad_rows:
            self._raise(f"{len(self.bad_rows)} bad row{'s' if len(self.bad_rows) > 1 else ''}")
        report = self.progress()
        if not self.num_records:
            raise DataError(f"{report.summary()}. Give a file with at least one usable record.")
        return report

    def progress(self) -> ReadReport:
        """The report so far, whether or not there were bad rows."""
        return ReadReport(self._path, self.format, self.num_rows, self.num_records, dict(self.left_out))

    def _rows(self) -> Iterator[Row]:
        """The good rows, joined if several form one."""
        rows = self._good_rows()
        first = next(rows, None)
        if first is None:
            return
        if self.format == "auto":
            self.format = self._detect(first)
        rows = chain([first], rows)
        gather = self._kind.formats[self.format].gather
        yield from rows if gather is None else gather(rows)

    def _good_rows(self) -> Iterator[Row]:
        if self.format == "auto" and PLAIN in self._kind.formats and is_text(self._path):
            self.format = PLAIN
        for row in (read_text if self.format == PLAIN else read_rows)(self._path):
            self.num_rows += 1
            check_share(self._path, self._kind.section, self.num_rows, self.num_records)
            if row.problem is None:
                yield row
            else:
                self._bad(row, row.problem)

    def _records(self, row: Row) -> Iterator[Record]:
        """The new records of a row. All are checked before the first is yielded."""
        form = self._kind.formats[self.format]
        try:
            if row.problem is not None:
                raise BadRow(row.problem)
            new: list[Record] = []
            for found in self._kind.records(row.fields, form):
                if isinstance(found, LeftOut):
                    self.left_out[str(found)] += 1
                elif self._is_new(found, row):
                    new.append(found[0])
        except BadRow as problem:
            self._bad(row, str(problem))
        except LeftOut as reason:
            self.left_out[str(reason)] += 1
        else:
            yield from new

    def _is_new(self, found: New[Record], row: Row) -> bool:
        if not self._seen.add(found[1]):
            self.left_out[DUPLICATE] += 1
            return False
        if self._kind.has_distinct_ids:
            self._check_id(row)
        return True

    def _check_id(self, row: Row) -> None:
        """Raises BadRow if an earlier row has the same id, and searches the file for that row."""
        key = self._kind.formats[self.format].id_key
        identity = given_id(row.fields, key)
        if identity is None or self._ids.add(hashlib.sha256(identity.encode()).digest()):
            return
        first = next(
            (earlier.number for earlier in read_rows(self._path) if str(earlier.fields.get(key)) == identity),
            row.number,
        )
        if first != row.number:
            raise BadRow(
                f"id {identity!r} is already used by row {first} for another prompt; make ids distinct or remove them"
            )

    def _bad(self, row: Row, problem: str) -> None:
        self.num_bad += 1
        if len(self.bad_rows) < KEPT_BAD_ROWS:
            self.bad_rows.append(f"row {row.number}: {problem}")
        if self.num_bad == self._max_bad_rows:
            self._raise(f"the first {self._max_bad_rows} bad rows")

    def _detect(self, row: Row) -> str:
        for name, form in self._kind.formats.items():
            if any(fields <= row.fields.keys() for fields in form.fields):
                return name
        raise DataError(
            f"{self._path}: row {row.number} fits no known format; its fields are: {field_names(row.fields)}. "
            f"Known formats: {self._catalogue()}. Rename the fields, or set {self._key}."
        )

    def _raise(self, heading: str) -> None:
        lines = "\n  ".join(self.bad_rows)
        raise DataError(
            f"{self._path}: {heading} (read as {self._key}={self.format!r}):\n  {lines}\n"
            f"Correct or remove these rows, or set {self._key} if they have another format: {self._catalogue()}."
        )

    def _catalogue(self) -> str:
        forms = self._kind.formats.items()
        return "; ".join(f"{name} {{{', '.join(sorted(form.fields[0]))}}}" for name, form in forms)
