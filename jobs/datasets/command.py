"""`rlhf data inspect FILE` and `rlhf data convert FILE OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.command import imported, run_command
from orchestrator.config.loader import load_config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Shows what a data file holds, and writes it in the canonical form (docs/data.md).",
)
File = Annotated[Path, typer.Argument(help="JSONL, JSON, Parquet or text; plain or compressed.")]
As = Annotated[
    str | None,
    typer.Option(
        "--as",
        help="What it holds: prompts, demonstrations, preferences, labels, scores, documents. Default: detected.",
    ),
]
Format = Annotated[str, typer.Option("--format", help="Record format. auto: detected from the first record's fields.")]


@app.command(epilog="\b\nExample:\n  rlhf data inspect chats.jsonl.gz --as demonstrations model.path=MODEL")
def inspect(
    file: File,
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides such as model.path=MODEL.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file; without it all defaults.")] = None,
    kind: As = None,
    format: Format = "auto",
    tokens: Annotated[bool, typer.Option(help="Count tokens and show samples with the model's tokenizer.")] = True,
) -> None:
    """Shows counts, rejected rows, token lengths and three records.

    Learned or scored tokens are green. Exit code: 0 all rows are good, 2 some are not."""

    def work() -> None:
        settings = load_config(config, overrides or ())
        imported("jobs.datasets.inspection:inspect")(file, kind, format, settings if tokens else None)

    run_command(work)


@app.command(epilog="\b\nExample:\n  rlhf data convert oasst.jsonl.gz prompts.parquet --as prompts")
def convert(
    file: File,
    out: Annotated[Path, typer.Argument(help="File to write; .gz and .zst compress JSONL.")],
    to: Annotated[str | None, typer.Option("--to", help="jsonl or parquet. Default: by the name of OUT.")] = None,
    kind: As = None,
    format: Format = "auto",
) -> None:
    """Writes the records of a file in the canonical form.

    Exit code: 0 written, 2 a row is bad."""

    def work() -> None:
        imported("jobs.datasets.conversion:convert")(file, out, to, kind, format)

    run_command(work)
