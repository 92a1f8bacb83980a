"""A new kind of reward is a section, a source, and a line in each table."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pytest

from actors.rewards import RewardContext, Score
from actors.rewards.table import SOURCES
from actors.roles.reward import RewardWorker
from jobs.configuration_docs import configuration_markdown
from orchestrator.config.loader import load_config
from orchestrator.config.rewards import REWARDS, RewardConfig
from orchestrator.errors import ConfigError
from tests.unit.actors.rewards.rollouts import rollout_table


# A complete kind of reward: these two classes, and a line in each table.
class IdleConfig(RewardConfig):
    name: Literal["idle"] = "idle"
    value: float = 0.0
    """Score of every sample."""


class Idle:
    def __init__(self, reward: IdleConfig, context: RewardContext) -> None:
        self._value = reward.value

    def scores(self, table: pa.Table) -> Sequence[Score]:
        return [Score(self._value)] * table.num_rows


LINES = {"config": ("idle", IdleConfig), "source": ("idle", f"{__name__}:Idle")}


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, *LINES["config"])  # type: ignore[arg-type]  a dict
    monkeypatch.setitem(SOURCES, *LINES["source"])  # type: ignore[arg-type]


@pytest.mark.usefixtures("idle")
def test_a_reward_that_does_nothing_is_chosen_checked_and_served(tmp_path: Path) -> None:
    config = load_config(None, ["reward.name=idle", "reward.value=3", "reward.clip=5"])
    context = RewardContext(config.model, None, tmp_path, config.rule_limits, total_s=1.0)
    assert RewardWorker(config.reward, context).score(rollout_table(["a", "b"]))["reward"].to_pylist() == [3.0, 3.0]
    with pytest.raises(ConfigError, match=r"'reward\.valu'; did you mean 'reward\.value'"):
        load_config(None, ["reward.name=idle", "reward.valu=3"])
    with pytest.raises(ConfigError, match=r"'reward\.value': it is legal only with reward\.name=idle"):
        load_config(None, ["reward.path=/m", "reward.value=3"])
    assert "### `reward`, name: `idle`" in configuration_markdown()


def test_it_takes_fewer_than_15_lines_besides_the_tables() -> None:
    lines = [line for part in (IdleConfig, Idle) for line in inspect.getsource(part).splitlines() if line.strip()]
    assert len(lines) < 15


def test_both_tables_have_the_same_names() -> None:
    assert list(SOURCES) == list(REWARDS)
