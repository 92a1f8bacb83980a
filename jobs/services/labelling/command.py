"""`rlhf label serve`, `add`, `invite`, `revoke`, `people`, `finish`, `export`, `backup` and `quickstart`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from jobs.command import imported, run_command, say
from jobs.services.labelling import people as links
from jobs.services.labelling.store import Store
from jobs.services.labelling.waiting import batches
from jobs.services.labelling.work import Rules
from orchestrator.data.inputs import read_text
from orchestrator.errors import ConfigError, DataError

_PORT = 8700
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="People judge replies in a browser; their judgements become data files (docs/labelling.md).",
)
Place = Annotated[str, typer.Option("--store", help="SQLite file, or URL of a PostgreSQL database.")]
Name = Annotated[str, typer.Argument(help="Name of the labeller.")]
Address = Annotated[str, typer.Option(help="Address of the service, for the link.")]


def _with_store(place: str, work: Callable[[Store], None]) -> None:
    def run() -> None:
        with closing(Store(place)) as store:
            work(store)

    run_command(run)


@app.command(epilog="\b\nExample:\n  rlhf label serve --store labels.db --guidelines guidelines.txt")
def serve(  # noqa: PLR0913  the parameters are the command's options
    store: Place = "labels.db",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = _PORT,
    guidelines: Annotated[Path | None, typer.Option(help="Text file, shown beside every task.")] = None,
    lease_minutes: Annotated[
        float, typer.Option(min=0.01, help="An abandoned task goes to somebody else after this time.")
    ] = 30.0,
    gold_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of tasks with a known answer, if there are some.")
    ] = 0.05,
    reviews: Annotated[
        int, typer.Option(min=0, help="Other people who review each text that somebody writes: 3 is usual; 0: none.")
    ] = 0,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests per second of one labeller, on average.")] = 20.0,
    certificate: Annotated[Path | None, typer.Option(help="PEM file, for HTTPS.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
) -> None:
    """Serves the page until Ctrl-C. A start continues where the last one ended."""

    def work(opened: Store) -> None:
        if until_eof:
            imported("jobs.services.labelling.web.serving:end_with_input")()
        settings = imported("jobs.services.labelling.web.app:Settings")(
            rules=Rules(60.0 * lease_minutes, gold_share, reviews),
            guidelines="" if guidelines is None else read_text(guidelines, f"guidelines {guidelines}", DataError),
            rate=rate,
            open_metrics=imported("jobs.services.labelling.web.serving:is_loopback")(host),
        )
        imported("jobs.services.labelling.web.serving:serve")(
            opened, settings, host=host, port=port, certificate=certificate, key=key, shows_link=not until_eof
        )

    _with_store(store, work)


@app.command(epilog="\b\nExample:\n  rlhf label add runs/my-run --task rank")
def add(  # noqa: PLR0913  the parameters are the command's options
    source: Annotated[Path, typer.Argument(help="Folder of a run, or a data file.")],
    task: Annotated[str, typer.Option(help="rank, compare, rate, write or prompt.")] = "rank",
    store: Place = "labels.db",
    stage: Annotated[str | None, typer.Option(help="Stage of the run. Default: the last with samples.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Step of the run's experience log.")] = None,
    format: Annotated[str, typer.Option("--format", help="Record format of a file.")] = "auto",
    kind: Annotated[str | None, typer.Option("--as", help="What a file holds, as in rlhf data inspect.")] = None,
    overlap: Annotated[int, typer.Option(min=1, help="People per item, for a share of the items.")] = 3,
    overlap_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="That share; others get one.")] = 0.1,
    gold: Annotated[bool, typer.Option(help="The file's order or ranks are known answers, to measure people.")] = False,
    priority: Annotated[float, typer.Option(help="Items of a higher one come first.")] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many items.")] = None,
    choose: Annotated[
        str | None, typer.Option(help="active: by what the run's reward model does not know; random. Needs --budget.")
    ] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Number of items that are chosen.")] = None,
    control: Annotated[float, typer.Option(help="Share of them that is drawn at random, to measure the choice.")] = 0.5,
    reward_model: Annotated[Path | None, typer.Option(help="Its folder. Default: the run's newest.")] = None,
) -> None:
    """Adds items to judge. Those that the store holds already are not added again."""

    def work(opened: Store) -> None:
        if source.is_dir():
            found = imported("jobs.services.labelling.items.sources:from_run")(source, stage=stage, step=step)
        else:
            found = imported("jobs.services.labelling.items.sources:from_file")(source, format, kind, say)
        if choose is not None or budget is not None:
            if choose is None or budget is None:
                raise ConfigError("--choose and --budget belong together: --choose active --budget 200.")
            chosen = imported("jobs.services.labelling.items.choosing:asked")(
                opened,
                found,
                imported("jobs.services.labelling.items.choosing:Asking")(task, budget, control),
                lambda: imported("jobs.services.labelling.items.measuring:states_of")(
                    source, stage=stage, step=step, model=reward_model, say=say
                ),
                how=choose,
            )
            say(chosen.describe())
            found = chosen.candidates
        wanted = imported("jobs.services.labelling.items.adding:Wanted")(
            task, overlap, overlap_share, gold, priority, limit
        )
        added = imported("jobs.services.labelling.items.adding:add")(opened, found, wanted, batch=source.name)
        say(
            f"{added.num_new} items added; {added.num_known} were there already, {added.num_unfit} prompts have not "
            f"enough different replies to {task}"
        )

    _with_store(store, work)


@app.command(epilog="\b\nExample:\n  rlhf label invite ann --address http://10.0.0.5:8700")
def invite(name: Name, store: Place = "labels.db", address: Address = f"http://127.0.0.1:{_PORT}") -> None:
    """Prints a link for a labeller, once. A new link ends the old one."""

    def work(opened: Store) -> None:
        with opened.writing() as connection:
            token = links.new_admin(connection) if name == "admin" else links.invite(connection, name)
        say(links.link(address, token))

    _with_store(store, work)


@app.command(epilog="\b\nExample:\n  rlhf label revoke ann")
def revoke(name: Name, store: Place = "labels.db") -> None:
    """Ends a labeller's link at once. Their judgements stay."""

    def work(opened: Store) -> None:
        with opened.writing() as connection:
            links.revoke(connection, name)
        say(f"the link of {name} has ended")

    _with_store(store, work)


@app.command(epilog="\b\nExample:\n  rlhf label pause ann --resume")
def pause(
    name: Name,
    store: Place = "labels.db",
    resume: Annotated[bool, typer.Option("--resume", help="Give tasks again.")] = False,
) -> None:
    """Gives a labeller no more tasks."""

    def work(opened: Store) -> None:
        with opened.writing() as connection:
            links.pause(connection, name, paused=not resume)
        say(f"{name} {'gets tasks again' if resume else 'gets no more tasks'}")

    _with_store(store, work)


@app.command(epilog="\b\nExample:\n  rlhf label people")
def people(store: Place = "labels.db") -> None:
    """Lists the labellers: judgements, time, agreement with others and with gold, reliability, spam score."""

    def work(opened: Store) -> None:
        with opened.reading() as connection:
            for part in ("quality", "arms"):
                for line in imported(f"jobs.services.labelling.agreement.{part}:lines")(connection):
                    say(line)

    _with_store(store, work)


@app.command(epilog="\b\nExample:\n  rlhf label finish my-run/people --store runs/my-run/labels.db")
def finish(
    batch: Annotated[
        str, typer.Argument(help="RUN/STAGE of a run that waits for people, or the source that was added.")
    ],
    store: Place = "labels.db",
    undo: Annotated[bool, typer.Option("--undo", help="Ask for the missing judgements again.")] = False,
) -> None:
    """Asks for no more judgements of a batch; a run that waits for it continues with those that there are."""

    def work(opened: Store) -> None:
        with opened.writing() as connection:
            batches.finish(connection, batch, is_finished=not undo)
        say(f"{batch}: {'the missing judgements are asked for again' if undo else 'no more judgements are asked for'}")

    _with_store(store, work)


@app.command(epilog="\b\nExample:\n  rlhf label export preferences.jsonl")
def export(
    out: Annotated[Path, typer.Argument(help="File to write: JSONL; JSON for argilla and label-studio.")],
    shape: Annotated[
        str,
        typer.Option(
            "--as",
            help="rankings, scores, demonstrations, prompts; judgements: everything, one per line; oasst, hh-rlhf, "
            "ultrafeedback, helpsteer2, helpsteer3, arena, argilla, label-studio.",
        ),
    ] = "rankings",
    store: Place = "labels.db",
) -> None:
    """Writes what was judged. rankings can be given as preferences.path."""

    def work(opened: Store) -> None:
        report = imported("jobs.services.labelling.exporting:export")(opened, out, shape)
        left_out = "".join(f"; {count} {reason}" for reason, count in report.left_out.items())
        say(f"{out}: {report.num_rows} rows of {report.num_items} items{left_out}")

    _with_store(store, work)


@app.command(epilog="\b\nExample:\n  rlhf label backup labels-copy.db")
def backup(
    out: Annotated[Path, typer.Argument(help="File to write.")],
    store: Place = "labels.db",
) -> None:
    """Copies the store while it is in use."""

    def work(opened: Store) -> None:
        opened.back_up(out)
        say(f"{out}: a copy of {opened.place}")

    _with_store(store, work)


@app.command(epilog="\b\nExample:\n  rlhf label quickstart --limit 10")
def quickstart(
    run: Annotated[Path | None, typer.Argument(help="Folder of a run. Default: the newest of the config.")] = None,
    config: Annotated[Path, typer.Option("--config", help="YAML file of the run.")] = Path(
        "jobs/configs/quickstart.yaml"
    ),
    limit: Annotated[int, typer.Option(min=1, help="Prompts to judge.")] = 20,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page, if there is a display.")] = True,
) -> None:
    """Shows samples of the quickstart to a person at this machine, until Ctrl-C or until all are judged, then compares
    its reward model with that person, and offers to train on what was judged."""

    def work() -> None:
        imported("jobs.services.labelling.embedded:label_run")(run, config, limit=limit, port=port, opens=browser)

    run_command(work)
