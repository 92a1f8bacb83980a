"""What the choice of items was worth: the arms of choosing.py by what people judged (docs/adr/0026-what-to-ask.md)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sqlalchemy import Connection, select

from jobs.services.labelling.agreement.merging import Pair, agreements, opinions
from jobs.services.labelling.tables import items, judgements
from orchestrator.training.acquisition import ACTIVE, CONTROL
from orchestrator.training.ranking import difference_interval, order, wilson_interval

Item = int | str
Judged = tuple[Item, Any, Mapping[str, Any], Sequence[Mapping[str, Any]]]
"""A judgement: item, answer, the item's source and replies."""


@dataclass(frozen=True)
class Arm:
    """Judged items of one arm.

    Args:
        wrong: of each item on which people prefer a reply, the share of its pairs that the reward model which chose it
            ordered otherwise than they did.
        agreed: of each item that several people judged, the share of their votes that agree, two people at a time.
        num_items: all of them.
    """

    num_items: int
    wrong: Sequence[float]
    agreed: Sequence[float]


def arms_of(connection: Connection) -> Mapping[str, Arm]:
    """The arms with judged items, by name."""
    found = connection.execute(
        select(judgements.c.item, judgements.c.answer, items.c.source, items.c.replies)
        .join(items)
        .where(judgements.c.undone_at.is_(None), items.c.gold.is_(None), items.c.kind.in_(("rank", "compare")))
        .order_by(judgements.c.seq)
    )
    return arms_among(tuple(row) for row in found)


def arms_among(found: Iterable[Judged]) -> Mapping[str, Arm]:
    """The arms with judged items, by name. Judgements are of tasks that compare replies."""
    answers: dict[str, dict[Item, list[Any]]] = {ACTIVE: defaultdict(list), CONTROL: defaultdict(list)}
    scores: dict[Item, Sequence[float | None]] = {}
    for item, answer, source, replies in found:
        arm = source.get("choice", {}).get("arm")
        if arm in answers:
            answers[arm][item].append(answer)
            scores[item] = [reply["source"].get("score") for reply in replies]
    return {name: _arm(of_items, scores) for name, of_items in answers.items() if of_items}


def _arm(answers: Mapping[Item, Sequence[Any]], scores: Mapping[Item, Sequence[float | None]]) -> Arm:
    votes = {item: [opinions(answer) for answer in given] for item, given in answers.items()}
    wrong = [_wrong(given, scores[item]) for item, given in votes.items()]
    agreed = [list(agreements(given)) for given in votes.values()]
    return Arm(
        len(answers),
        [share for share in wrong if share is not None],
        [fmean(each) for each in agreed if each],
    )


def _wrong(votes: Sequence[Mapping[Pair, float]], scores: Sequence[float | None]) -> float | None:
    """Pairs that people tie do not count; equal scores are half wrong."""
    shares = []
    for pair in {pair for vote in votes for pair in vote}:
        liked = fmean(vote[pair] for vote in votes if pair in vote)
        first, second = scores[pair[0]], scores[pair[1]]
        if liked != 0.5 and first is not None and second is not None:
            right = order(first, second)
            shares.append(1.0 - right if liked > 0.5 else right)
    return fmean(shares) if shares else None


def lines(connection: Connection) -> Iterator[str]:
    """A table for the console; nothing if no item was chosen."""
    yield from table_of(arms_of(connection))


def table_of(found: Mapping[str, Arm]) -> Iterator[str]:
    """The same of these arms."""
    if not found:
        return
    yield f"{'asked':<10}{'items':>7}  {'reward model was wrong on':<34}people agree"
    for name, arm in found.items():
        agreed = f"{fmean(arm.agreed):.0%} ({len(arm.agreed)} items)" if arm.agreed else "-"
        yield f"{name:<10}{arm.num_items:>7}  {_share(arm.wrong):<34}{agreed}"
    if all(name in found and found[name].wrong for name in (ACTIVE, CONTROL)):
        yield _difference(found[ACTIVE].wrong, found[CONTROL].wrong)


def _share(wrong: Sequence[float]) -> str:
    """Pairs of one item depend on each other, so an item counts as one trial."""
    if not wrong:
        return "-"
    low, high = wilson_interval(sum(wrong), len(wrong))
    return f"{fmean(wrong):.1%} (95 %: {low:.1%} to {high:.1%})"


def _difference(active: Sequence[float], control: Sequence[float]) -> str:
    low, high = (100 * end for end in difference_interval(sum(active), len(active), sum(control), len(control)))
    apart = 100 * (fmean(active) - fmean(control))
    shown = "more errors are found" if low > 0 else "fewer errors are found" if high < 0 else "no difference is shown"
    return f"active less control: {apart:+.1f} points (95 %: {low:+.1f} to {high:+.1f}): {shown}"
