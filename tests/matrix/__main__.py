"""Tries every architecture and writes docs/architectures.md. Exits with 1 if the table changed."""

from __future__ import annotations

import sys

from tests.matrix.architectures import ALL, TABLE, render, rows


def main() -> int:
    text = render(rows(ALL))
    before = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    TABLE.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return int(text != before)


if __name__ == "__main__":
    sys.exit(main())
