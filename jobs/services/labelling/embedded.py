"""`make label`: a person at this machine judges samples of a run, and its rewards are compared with that person.

The samples are those of the run's experience log: their rewards are known, and its reward model has not learned them.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from time import monotonic

import typer
from sqlalchemy import Connection

from jobs.command import imported, say
from jobs.quickstart import set_environment
from jobs.services.labelling import people
from jobs.services.labelling.exporting import export
from jobs.services.labelling.items.adding import Wanted, add
from jobs.services.labelling.items.sources import Candidate, from_run
from jobs.services.labelling.shapes.judged import Exported, every, judges_of
from jobs.services.labelling.store import Store
from jobs.services.labelling.web.app import Settings, create_app
from jobs.services.labelling.web.serving import address_of, listening, run
from jobs.services.labelling.work import Rules, progress
from jobs.stages.reward_model import RESULT_FILE
from orchestrator.config.loader import load_config
from orchestrator.errors import DataError, StorageError
from orchestrator.run.experience_log import num_committed
from orchestrator.run.folder import CONFIG_FILE, RunFolder, storage_root
from orchestrator.run.storage import read_json, reading
from orchestrator.training.ranking import order, wilson_interval

HOST = "127.0.0.1"
NAME = "you"
STORE_FILE = "labels.db"
EXPORT_FILE = "labels.jsonl"
REWARD_MODEL = "reward-model"
_LINGER_S = 3.0  # for the page, after the last judgement


@dataclass(frozen=True)
class Agreement:
    """How rewards order pairs of replies that a person ordered. Equal rewards agree by half.

    Args:
        num_tied: pairs that the person found equal, which are not counted.
    """

    num_items: int
    num_pairs: int
    num_agreed: float
    num_tied: int

    def describe(self) -> str:
        tied = f"; you found {self.num_tied} pairs equal" if self.num_tied else ""
        if not self.num_pairs:
            return f"no pair of replies to compare{tied}"
        low, high = wilson_interval(self.num_agreed, self.num_pairs)
        return (
            f"the reward model orders {self.num_agreed / self.num_pairs:.1%} of {self.num_pairs} pairs of "
            f"{self.num_items} prompts as you did (95 %: {low:.1%} to {high:.1%}){tied}"
        )


def label_run(folder: Path | None, config: Path, *, limit: int, port: int, opens: bool) -> None:
    """Raises:
    CapacityError: another service has the store, or the port is taken.
    DataError: there is no such run, or its log can't be read.
    """
    place = folder or newest_run(config)
    num_steps = _num_steps(place)
    with closing(Store(str(place / STORE_FILE))) as store:
        add(store, logged(place, num_steps), Wanted("rank", overlap_share=0.0, limit=limit), batch=place.name)
        _serve(store, place, limit, port, opens=opens)
        with store.reading() as connection:
            found = agreement(connection)
        say(found.describe())
        if not found.num_pairs:
            say("there is nothing to train on yet; the same command continues.")
            return
        out = place / EXPORT_FILE
        report = export(store, out, "rankings")
        rows = f" in {report.num_rows} rows, one for each pair where you gave ties"
        say(f"{out}: your rankings of {report.num_items} prompts{rows if report.num_rows > report.num_items else ''}")
    offer(place, out)


def newest_run(config: Path) -> Path:
    """The newest run of a config that has sampled. Raises DataError."""
    settings = load_config(config).run
    root = storage_root(settings.root)
    with reading(root):
        found = [path.parent for path in root.glob(f"{settings.name}-*/{CONFIG_FILE}")]
        runs = [path for path in found if num_committed(_log(path))]
        if not runs:
            raise DataError(f"{root} has no run of {config} with samples: run `make quickstart`, or give RUN.")
        return max(runs, key=lambda path: (path / CONFIG_FILE).stat().st_mtime)


def _log(folder: Path) -> Path:
    return RunFolder(folder, folder.name, attempt=0).log


def _num_steps(folder: Path) -> int:
    """Steps in the experience log of a run. Raises DataError."""
    num_steps = num_committed(_log(folder))
    if not num_steps:
        problem = "has no committed step" if folder.is_dir() else "is no folder"
        raise DataError(f"{folder} {problem}: give the folder of a run whose stage rl has sampled, or none.")
    return num_steps


def logged(folder: Path, num_steps: int) -> Iterator[Candidate]:
    """The samples of the first steps."""
    for step in range(num_steps):
        yield from from_run(folder, stage=None, step=step)


def _serve(store: Store, folder: Path, limit: int, port: int, *, opens: bool) -> None:
    """Until Ctrl-C, or until nothing is left to judge."""
    settings = Settings(rules=Rules(gold_share=0.0))
    # Ctrl-C is an end like others, also before the server listens for it.
    with suppress(KeyboardInterrupt), store.served(), listening(HOST, port) as listener:
        with store.writing() as connection:
            token = people.invite(connection, NAME)
            person = people.person_of(connection, token)
            assert person is not None
            found = progress(connection, person)
        if not found["left"]:
            say(f"{folder}: nothing is left to judge; --limit {2 * limit} shows more prompts, if the run has more.")
            return
        say(f"{folder}: {found['left']} prompts to judge, {found['done']} judged before. Stop with Ctrl-C at any time:")
        say("what the page has confirmed is kept, and the same command continues.")
        address = people.link(address_of(HOST, listener.getsockname()[1]), token)
        say(f"judge here: {address}")
        with _opened(store, address) if opens and has_display() else nullcontext():
            run(create_app(store, settings), listener, until=Done(store, person))


class Done:
    """Whether nothing has been left for a person for a while: all is judged, or skipped."""

    def __init__(self, store: Store, person: people.Person) -> None:
        self._store, self._person = store, person
        self._since: float | None = None

    def __call__(self) -> bool:
        with suppress(StorageError), self._store.reading() as connection:
            left = progress(connection, self._person)["left"]
            self._since = None if left else self._since or monotonic()
        return self._since is not None and monotonic() - self._since >= _LINGER_S


def has_display() -> bool:
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


@contextmanager
def _opened(store: Store, address: str) -> Iterator[None]:
    """Opens the browser by a file that leads to the page: everybody on a machine can read a command line, and only this
    user the file."""
    assert store.file is not None
    page = store.file.with_suffix(".html")
    page.touch(mode=0o600)
    page.write_text(f'<meta http-equiv="refresh" content="0; url={escape(address)}">\n', encoding="utf-8")
    try:
        webbrowser.open(page.as_uri())
        yield
    finally:
        page.unlink(missing_ok=True)


def agreement(connection: Connection) -> Agreement:
    """Of the rewards of samples with all judgements of them."""
    num_items = num_pairs = num_tied = 0
    agreed = 0.0
    for judged in every(connection, judges_of(connection), Exported()):
        rewards = [each["source"].get("reward") for each in judged.item.replies]
        known = [vote for vote in judged.votes if None not in (rewards[vote.first], rewards[vote.second])]
        for vote in known:
            if vote.first_is_better == 0.5:
                num_tied += 1
                continue
            better, worse = (vote.first, vote.second)[:: 1 if vote.first_is_better else -1]
            agreed += order(rewards[better], rewards[worse])
            num_pairs += 1
        num_items += bool(known)
    return Agreement(num_items, num_pairs, agreed, num_tied)


def offer(folder: Path, rankings: Path) -> None:
    """Asks whether to train on the rankings, and says what comes next; prints the command where nobody can be asked."""
    overrides = training(folder, rankings)
    if not sys.stdin.isatty() or not _agreed("train the reward model further on your rankings, as a new run?"):
        say(f"to train the reward model on them: {_command('reward-model', folder, overrides)}")
        return
    say("Ctrl-C stops the training; your rankings are kept, and `make label` asks again.")
    set_environment()
    config = load_config(folder / CONFIG_FILE, overrides)
    trained: Path = imported("jobs.stages.work.reward_model:run_alone")(config, None)
    result = read_json(trained / RESULT_FILE)
    if not result["num_held_out"]:
        say("none of your rankings was held out, so nothing measures the new reward model: judge more prompts.")
    say(f"the new reward model: {result['path']}; that of {folder} is as it was.")
    reward = f"{{name: model, path: {json.dumps(result['path'])}}}"
    then = _command("run", folder, ["stages=[rl]", "run.id=null", f"reward={reward}"])
    say(f"to train the policy with it: {then}; then `make label` again shows replies of that run.")


def _command(name: str, folder: Path, overrides: Sequence[str]) -> str:
    return shlex.join(["rlhf", name, "--config", str(folder / CONFIG_FILE), *overrides])


def training(folder: Path, rankings: Path) -> Sequence[str]:
    """Overrides of a run that trains the run's reward model further, on these rankings."""
    base = folder.absolute() / REWARD_MODEL
    return [
        "stages=[reward_model]",
        "run.id=null",
        f"run.name={folder.name}-labels",
        f"preferences.path={rankings.absolute()}",
        *([f"reward_model.base={base}"] if base.is_dir() else []),
    ]


def _agreed(question: str) -> bool:
    try:
        return typer.confirm(question, default=False)
    except typer.Abort:
        say("")  # the answer was Ctrl-C, and the cursor is behind the question
        return False
