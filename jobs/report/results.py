"""The end of a run: the report, and its result table on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from jobs.command import out, say
from jobs.report.command import result_facts, write_report
from jobs.report.data import read_run
from jobs.report.stages import read_stages
from orchestrator.errors import RlhfError


def show_results(run_folder: Path) -> None:
    """Does not raise if the report can't be written: the run is complete."""
    try:
        facts = list(result_facts(read_run(run_folder), read_stages(run_folder)))
    except RlhfError:
        return  # nothing to report, such as of a run that only samples
    try:
        report: Path | str = write_report(run_folder)
    except (OSError, RlhfError) as error:
        report = f"not written ({error}); make it with `rlhf report {run_folder}`"
    table = Table(title=f"run {run_folder.name}", show_header=False)
    for fact in facts:
        table.add_row(fact.name, fact.value, fact.detail)
    out.print(table)
    say(f"report: {report}")
    say(f"run folder: {run_folder}")
