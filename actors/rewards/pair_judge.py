"""Compares two replies to a prompt by a judge, in both orders: judges prefer a place (Zheng 2023, MT-Bench, 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.rewards import Sample
from actors.rewards.endpoint import FIRST_PAUSE_S
from actors.rewards.judge import PAIR_VARIABLES, Judge, Judgement, conversation
from orchestrator.config.rewards import PairJudgeConfig

SECTION = "evaluate.judge"
_VALUES = {"A": 1.0, "B": 0.0, "C": 0.5}


@dataclass(frozen=True)
class Comparison:
    """`value`: 1 the left reply is better in both orders, 0 the right one, 0.5 a tie, or the orders disagree. None: a
    failure, and `error` is the reason."""

    value: float | None
    disagrees: bool = False
    error: str | None = None


class PairJudge:
    """Raises ConfigError and StorageError; see Judge."""

    def __init__(
        self,
        judge: PairJudgeConfig,
        template: str | None = None,
        *,
        cache: Path | None = None,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._judge = Judge(
            judge,
            template,
            variables=PAIR_VARIABLES,
            default="judge_pair.jinja",
            section=SECTION,
            cache=cache,
            first_pause_s=first_pause_s,
        )

    async def compare(self, left: Sequence[Sample], right: Sequence[Sample], until: float) -> list[Comparison]:
        """Compares replies to the same prompts, in order.

        Args:
            until: deadline on the monotonic clock.

        Raises:
            RewardError: the endpoint answers no question.
        """
        questions = [
            {**conversation(mine), "first": first.response, "second": second.response}
            for mine, theirs in zip(left, right, strict=True)
            for first, second in ((mine, theirs), (theirs, mine))
        ]
        found = await self._judge.judgements(questions, until)
        return [_comparison(*found[at : at + 2]) for at in range(0, len(found), 2)]


def _comparison(straight: Judgement, swapped: Judgement) -> Comparison:
    values = [_value(straight), _value(swapped)]
    if values[0] is None or values[1] is None:
        failed = straight if values[0] is None else swapped
        return Comparison(None, error=failed.error or f"the judge's verdict {failed.verdict!r} is not A, B or C")
    mine, theirs = values[0], 1.0 - values[1]
    return Comparison(mine if mine == theirs else 0.5, disagrees=mine != theirs)


def _value(judgement: Judgement) -> float | None:
    return None if judgement.verdict is None else _VALUES.get(judgement.verdict)
