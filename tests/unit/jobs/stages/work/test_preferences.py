"""Replies that the gold rule could not score: told, and an error only where it could score none."""

from __future__ import annotations

import pytest

from actors.rewards import Score
from jobs.stages.work.preferences import require_some
from orchestrator.errors import DataError

GOLD = "package.rules:kindness"
FAILED = Score(None, error="rule kindness: KeyError: 'tone'")


def test_failed_replies_are_counted_with_a_reason() -> None:
    assert require_some([Score(1.0), FAILED, Score(0.0), FAILED], GOLD) == (
        "the gold rule package.rules:kindness failed on 2 of 4 replies, which are left out: "
        "rule kindness: KeyError: 'tone'"
    )
    assert require_some([Score(1.0), Score(0.0)], GOLD) == ""


def test_a_gold_rule_that_scores_nothing_is_an_error_with_its_reason_and_the_way_out() -> None:
    with pytest.raises(DataError, match=r"failed on all 2 sampled replies: .*'tone'\. Correct labeller\.gold, or give"):
        require_some([FAILED, FAILED], GOLD)
