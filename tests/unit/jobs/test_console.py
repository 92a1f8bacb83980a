"""Printing of untrusted text."""

from __future__ import annotations

import pytest
import typer

from jobs.cluster.submit import write_raw
from jobs.command import err, out, run_command, say
from orchestrator.errors import DataError

ATTACK = "\x1b]0;owned\x1b\\ http://u:secret@h/ [bold]x[/]"
SHOWN = "\\x1b]0;owned\\x1b\\ http://***@h/ [bold]x[/]"


def test_lines_tables_and_a_jobs_output_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say(ATTACK)
    write_raw(ATTACK + "\n")
    out.print(ATTACK, markup=False)
    assert capsys.readouterr().out == f"{SHOWN}\n" * 3


def test_errors_and_warnings_cannot_either(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise DataError(ATTACK)

    with pytest.raises(typer.Exit):
        run_command(work)
    err.print(ATTACK, markup=False)
    assert capsys.readouterr().err == f"DataError: {SHOWN}\n{SHOWN}\n"
