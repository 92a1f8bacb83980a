"""`python -m benchmarks.labelling [--items N] [--labellers N] [--pools N] [--stores sqlite postgresql]`

Simulated labellers over HTTP against `rlhf label serve` in a process of its own: three spammers among careful people of
planted reliability; every item is judged by three. Shows who is found and who is accused, how well merged orders agree
with the true ones, and how fast the service is. Then the same in this process for many crowds: how often careful people
are accused.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from sqlalchemy import select

from benchmarks.harness import Better, Figure, plain_figure
from benchmarks.labelling.clients import Times, label, reply_text
from benchmarks.labelling.minds import BEST, NUM_REPLIES, WORST, Crowd, crowd, true_scores
from benchmarks.labelling.pools import NUM_GOLD, verdicts
from benchmarks.labelling.service import POSTGRESQL, address_of, postgresql, service, until_healthy
from benchmarks.labelling.verdicts import gains, taus, verdict
from benchmarks.table import report
from jobs.services.labelling import people
from jobs.services.labelling.agreement.alpha import alphas
from jobs.services.labelling.agreement.given import Given, given_in
from jobs.services.labelling.agreement.merging import Electorate, electorate, reliabilities, votes_of
from jobs.services.labelling.agreement.quality import Figures, figures_of
from jobs.services.labelling.items.adding import Wanted, add
from jobs.services.labelling.items.sources import Candidate
from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import items
from jobs.services.labelling.tables import people as accounts
from orchestrator.training.ranking import wilson_interval

OVERLAP = 3
EVERY_S, NUM_PACED = 1.0, 15  # of each labeller, faster than a person
POOL_ITEMS = 600
_SHOWN = ("sqlite", "postgresql")

console = Console(width=150, highlight=False)


@dataclass(frozen=True)
class Labelled:
    """What is in a store at the end, the times of paced and of hurried labellers, and the service's CPU time for the
    hurried ones."""

    given: Sequence[Given]
    names: Mapping[int, str]
    scores: Mapping[int, Sequence[float]]
    paced: Times
    hurried: Times
    cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--labellers", type=int, default=20)
    parser.add_argument("--pools", type=int, default=200, help="crowds that are drawn in this process")
    parser.add_argument("--stores", nargs="*", choices=_SHOWN, default=_SHOWN)
    parser.add_argument("--seed", type=int, default=0)
    found = parser.parse_args()
    figures: list[Figure] = []
    for name in found.stores:
        if name == "postgresql" and not POSTGRESQL:
            console.print("PostgreSQL is left out: apt-get install postgresql")
            continue
        minds = crowd(found.labellers, found.seed)
        labelled = over_http(name, minds, found.items, found.seed)
        figures += speed(name, labelled)
        figures += judged(name, minds, labelled, found.seed)
    if found.pools:
        figures += accusations(found.pools, found.labellers)
    report("labelling", figures)


def over_http(kind: str, minds: Crowd, num_items: int, seed: int) -> Labelled:
    """A store is filled, served, and judged until nothing is left."""
    scores = true_scores(num_items + NUM_GOLD, seed)
    with place_of(kind) as place, closing(Store(place)) as store:
        fill(store, scores, num_items)
        with store.writing() as connection:
            tokens = {mind.name: people.invite(connection, mind.name) for mind in minds.minds}
        with service(place, 0, "--rate", "100000") as process:
            address = address_of(process)
            until_healthy(address, process)
            run = asyncio.run
            paced = run(label(address, tokens, minds.minds, scores, every_s=EVERY_S, limit=NUM_PACED))
            before = cpu_s(process.pid)
            hurried = run(label(address, tokens, minds.minds, scores))
            spent_s = cpu_s(process.pid) - before
        with store.reading() as connection:
            given = given_in(connection)
            names = {row.id: row.name for row in connection.execute(select(accounts.c.id, accounts.c.name))}
            prompts = connection.execute(select(items.c.id, items.c.prompt_id)).all()
    true = {row.id: scores[int(row.prompt_id.removeprefix("prompt-"))] for row in prompts}
    return Labelled(
        given, {person: name for person, name in names.items() if name in tokens}, true, paced, hurried, spent_s
    )


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextmanager
def place_of(kind: str) -> Iterator[str]:
    with (
        tempfile.TemporaryDirectory(prefix="labels-") as folder,
        postgresql() if kind == "postgresql" else nullcontext(str(Path(folder) / "labels.db")) as place,
    ):
        yield place


def fill(store: Store, scores: Sequence[Sequence[float]], num_items: int) -> None:
    """Items have the numbers of their scores, and ids from 1. Gold items come last."""

    def candidates(numbers: range) -> Iterator[Candidate]:
        for number in numbers:
            replies = [{"reply": reply_text(number, reply), "source": {}} for reply in range(NUM_REPLIES)]
            messages = [{"role": "user", "content": f"Question {number}?"}]
            yield Candidate(f"prompt-{number}", messages, [], replies, {}, scores[number])

    add(store, candidates(range(num_items)), Wanted("rank", OVERLAP, 1.0), batch="items")
    add(store, candidates(range(num_items, len(scores))), Wanted("rank", gold=True), batch="gold")


def speed(kind: str, labelled: Labelled) -> list[Figure]:
    paced, hurried = labelled.paced, labelled.hurried
    each = f"{len(hurried.requests['next']):,} tasks, {len(labelled.names)} clients"
    spent = [1000 * labelled.cpu_s / len(hurried.confirmed)]
    figures = [
        plain_figure(f"{kind}: judgements", [hurried.per_second()], "1/s", detail=f"{each} without a pause"),
        plain_figure(
            f"{kind}: CPU of a judgement", spent, "ms", better="lower", detail="the service's, claim and answer"
        ),
    ]
    for what, times in (("paced", paced), ("hurried", hurried)):
        for path in ("next", "judgements"):
            p50, p99 = 1000 * np.quantile(times.requests[path], [0.5, 0.99])
            name = f"{kind}, {what}: p50 of {'claim' if path == 'next' else 'answer'}"
            detail = f"p99 {p99:.1f} ms; {times.per_second():.0f} judgements/s"
            figures.append(
                Figure(name, p50, p50, p99, p50, None, "ms", len(times.requests[path]), "lower", None, detail)
            )
    return figures


def judged(kind: str, minds: Crowd, labelled: Labelled, seed: int) -> list[Figure]:
    judges = electorate(labelled.given)
    figures = figures_of(labelled.given, labelled.names, judges)
    show(minds, figures)
    show_copies(minds, labelled, judges)
    found = verdict(minds, figures)
    console.print(
        f"{kind}: found {sorted(found.found)}, missed {sorted(found.missed)}, accused {sorted(found.accused)}"
    )
    for task, alpha in alphas(judges.voters.once(labelled.given)).items():
        console.print(f"Krippendorff's alpha, {task}: {alpha.value:.3f} of {alpha.num_items:,} items")
    return against_people(kind, labelled, judges, seed)


def against_people(kind: str, labelled: Labelled, judges: Electorate, seed: int) -> list[Figure]:
    """Merged orders beside single people: how far both agree with the true order."""
    agreement = taus(labelled.given, labelled.scores, judges)
    merged, best = statistics.fmean(agreement.merged.values()), agreement.best()
    others = {
        "mean": ("mean person", agreement.mean_single()),
        "best": (f"best person, {labelled.names[best]}", statistics.fmean(agreement.of(best))),
    }
    detail = "to the true order; 95 % interval over items"
    figures = []
    for name, (gain, low, high) in gains(agreement, seed).items():
        whom, tau = others[name]
        named = f"{kind}: tau of merged orders less {whom}"
        figures.append(Figure(named, gain, low, high, merged, tau, "", len(agreement.merged), detail=detail))
    return figures


def show(minds: Crowd, figures: Sequence[Figures]) -> None:
    columns = ("planted", "reliability", "others", "gold", "spam", "first shown", "same answers as")
    table = Table("labeller", "judged", *columns, title="share of pairs ordered correctly; Kendall's tau-b; spam score")
    for each in figures:
        planted = minds.by_name[each.name].accuracy
        numbers = (planted, each.reliability, each.with_others, each.with_gold, each.spam, each.first_share)
        cells = ("-" if number is None else f"{number:.2f}" for number in numbers)
        table.add_row(each.name, str(each.num), *cells, each.copy_of or "")
    console.print(table)


def show_copies(minds: Crowd, labelled: Labelled, judges: Electorate) -> None:
    """The reliability of the mind with two accounts: as one voter, and if both accounts were voters."""
    people = {name: person for person, name in labelled.names.items()}
    votes = [vote for each in labelled.given for vote in votes_of(each.item, each.person, each.answer)]
    gold = {
        (each.item, vote.first, vote.second): vote.first_is_better
        for each in labelled.given
        if each.gold is not None
        for vote in votes_of(each.item, 0, each.gold)
    }
    assert minds.source is not None
    source, copy = people[minds.source], people["copy"]
    apart = reliabilities(votes, gold)
    console.print(
        f"{minds.source} and copy: planted {minds.by_name['copy'].accuracy:.3f}; as one voter "
        f"{judges.reliability[judges.voters.of(copy)]:.3f}; as two {apart[source]:.3f} and {apart[copy]:.3f}"
    )


def accusations(num_pools: int, num_people: int) -> list[Figure]:
    kinds: Mapping[str, tuple[bool, float, float, int]] = {
        "three spammers": (True, WORST, BEST, 2000),
        "three spammers, few judgements": (True, WORST, BEST, POOL_ITEMS),
        "all careful": (False, WORST, BEST, POOL_ITEMS),
        "all very careful": (False, 0.985, 0.995, POOL_ITEMS),
        "all mediocre": (False, 0.65, 0.72, POOL_ITEMS),
    }
    figures = []
    for name, (spammers, worst, best, num_items) in kinds.items():
        found = verdicts(num_pools, num_people, num_items, spammers=spammers, worst=worst, best=best)
        what = f"{num_items:,} items, judged by {OVERLAP} of {num_people}"
        num_careful, num_spammers = num_people - 3 * spammers, 3 * spammers
        num_accused = sum(len(each.accused) for each in found)
        figures.append(_share(f"{name}: careful people accused", num_accused, num_pools * num_careful, "lower", what))
        if spammers:
            num_found = sum(len(each.found) for each in found)
            figures.append(_share(f"{name}: found", num_found, num_pools * num_spammers, "higher", what))
    return figures


def _share(name: str, count: int, trials: int, better: Better, what: str) -> Figure:
    share, (low, high) = count / trials, wilson_interval(count, trials)
    detail = f"{count:,} of {trials:,}; {what}; 95 % interval"
    return Figure(name, share, low, high, share, None, "", trials, better, None, detail)


if __name__ == "__main__":
    main()
