"""evaluate.tasks where lm-eval is missing; with it, see tests/integration/test_tasks.py."""

from __future__ import annotations

import sys

import pytest

from actors.roles.tasks import metrics_of
from jobs.check.tasks import check_tasks
from jobs.stages.stage import Found
from orchestrator.config.loader import config_from_tree
from orchestrator.errors import DataError

NOTHING = Found(None, None, None)


def test_a_missing_package_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    config = config_from_tree({"evaluate": {"tasks": ["arc_easy"]}}, source="test")
    with pytest.raises(DataError, match=r"needs the package lm-eval.*pip install.*evaluate\.tasks=\[\]"):
        check_tasks(config, NOTHING)


def test_without_tasks_the_package_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert check_tasks(config_from_tree({}, source="test"), NOTHING) is None


def test_metrics_are_named_by_task_and_filter() -> None:
    found = {
        "alias": "gsm8k",
        "exact_match,strict-match": 0.25,
        "acc,none": 1,
        "acc_stderr,none": "N/A",
        "sample_len": 3,
    }
    assert metrics_of({"results": {"gsm8k": found}}) == {"gsm8k/exact_match/strict-match": 0.25, "gsm8k/acc": 1.0}
