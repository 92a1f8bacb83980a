"""An external reward model uses its maximum length; cuts are reported before a run starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.check.rewards import check_pair_judge, check_reward, check_reward_window
from jobs.stages.rewarding import reward_inputs, reward_uses
from jobs.stages.settings import reward_max_length
from jobs.stages.stage import Found
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.config.rewards import reward_models
from orchestrator.errors import ConfigError, DataError
from orchestrator.watching.telemetry import Telemetry
from tests.tiny import tiny_llama, tiny_scorer
from tests.unit.actors.rewards.endpoints import endpoints
from tests.unit.actors.rewards.rollouts import rollout_table


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scorer(tmp_path_factory.mktemp("scorer"))


def window_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])


def window_note(config: Config) -> str | None:
    return check_reward_window(config, Found(None, None, None))


def config_of(cache: Path, reward: dict[str, Any], **sections: Any) -> Config:
    return config_from_tree({"run": {"cache": str(cache)}, "reward": reward, **sections}, source="test")


def test_the_length_is_the_keys_else_the_stages_else_the_models_own(tmp_path: Path) -> None:
    trained = {"stages": ["reward_model", "rl"], "preferences": {"path": "x"}, "reward_model": {"max_length": 100}}
    assert longest(config_of(tmp_path, {}, **trained)) == 100
    assert longest(config_of(tmp_path, {"max_length": 90}, **trained)) == 90
    assert longest(config_of(tmp_path, {"path": "x"}, reward_model={"max_length": 100})) is None
    assert longest(config_of(tmp_path, {"path": "x", "max_length": 700})) == 700


def longest(config: Config) -> int | None:
    (source,) = reward_models(config.reward).values()
    return reward_max_length(config, source)


def test_a_model_whose_window_holds_a_transcript_needs_no_word(scorer: Path, tmp_path: Path) -> None:
    longest = {"model": {"max_length": window_of(scorer)}}
    assert window_note(config_of(tmp_path, {"path": str(scorer)}, **longest)) is None


def test_what_will_be_cut_is_said(scorer: Path, tmp_path: Path) -> None:
    longer = {"model": {"path": str(scorer), "max_length": window_of(scorer) + 1}}
    note = window_note(config_of(tmp_path, {"path": str(scorer)}, **longer))
    assert note is not None and f"takes the last {window_of(scorer)} tokens" in note and "reward/cut" in note
    note = window_note(config_of(tmp_path, {"path": str(scorer), "max_length": 40}, **longer))
    assert note is not None and "takes the last 40 tokens" in note


def test_the_model_that_the_run_trains_is_told_of_too(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    sections = {"stages": ["reward_model", "rl"], "preferences": {"path": "x"}, "reward_model": {"max_length": 30}}
    model = {"path": str(base), "max_length": 128}
    note = window_note(config_of(tmp_path, {}, model=model, **sections))
    assert note is not None and "takes the last 30 tokens" in note


def test_more_than_the_window_is_refused_with_the_way_out(scorer: Path, tmp_path: Path) -> None:
    there = window_of(scorer)
    with pytest.raises(ConfigError, match=rf"reward\.max_length={there + 1} exceeds .* Set reward\.max_length={there}"):
        window_note(config_of(tmp_path, {"path": str(scorer), "max_length": there + 1}))


def judged(answer: str, check: Any, tmp_path: Path, **sections: Any) -> str | None:
    """What a check says of a judge that answers this."""
    with endpoints() as start:
        endpoint = start((200, {"choices": [{"message": {"content": answer}}]}))
        judge = {"url": endpoint.url, "model": "m", "retries": 0}
        tree = {"reward": {"name": "judge", **judge}, "evaluate": {"judge": judge}, "run": {"cache": str(tmp_path)}}
        config = config_from_tree({**tree, **sections}, source="test")
        try:
            return check(config, Found(None, None, rollout_table(["Fine."] * 3)))  # type: ignore[no-any-return]
        finally:
            assert len(endpoint.asked) == (1 if check is check_reward else 2)
            assert not list(tmp_path.rglob("*.json")), "a trial is not kept"


def test_a_judge_is_tried_and_its_answer_is_shown(tmp_path: Path) -> None:
    said = judged("Good enough. [[6.5]]", check_reward, tmp_path)
    assert (
        said is not None and "1 of 1 sample prompts; its answer ends with 'Good enough. [[6.5]]', which is 6.5" in said
    )
    said = judged("[[C]]", check_pair_judge, tmp_path)
    assert said is not None and said.endswith("compares a made-up reply with itself and values it 0.5")
    said = judged("[[A]]", check_pair_judge, tmp_path)
    assert said is not None and said.endswith("disagrees with itself in the other order")


def test_a_judge_without_a_verdict_is_refused_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no verdict: '6 of 10'.*reward\.template"):
        judged("6 of 10", check_reward, tmp_path)
    with pytest.raises(ConfigError, match=r"evaluate\.judge gave no verdict: .*'both are fine'"):
        judged("both are fine", check_pair_judge, tmp_path)
    with pytest.raises(DataError, match=r"reward\.template=.*none\.jinja does not exist"):
        missing = {"name": "judge", "url": "http://127.0.0.1:1/v1", "model": "m", "template": "none.jinja"}
        check_reward(config_of(tmp_path, missing), Found(None, None, None))


def test_every_source_of_a_weighted_reward_is_checked_and_named(scorer: Path, tmp_path: Path) -> None:
    length = {"function": "actors.rewards.rules:length_target"}
    sources = {"quality": {"path": str(scorer), "normalise": False}, "brief": {"name": "rules", "rules": [length]}}
    examples = Found(None, None, rollout_table(["Fine."] * 3))

    def said(**more: Any) -> str | None:
        return check_reward(config_of(tmp_path, {"name": "weighted", "sources": {**sources, **more}}), examples)

    first, second = str(said()).split("\n")
    assert first.startswith("reward.sources.quality (model): ") and first.endswith("has a scalar head")
    assert second == "reward.sources.brief (rules): scores a made-up reply to 3 of 3 sample prompts"
    with pytest.raises(DataError, match=r"reward\.sources\.quality: .*reward_stats\.json"):
        said(quality={"path": str(scorer)})
    with pytest.raises(ConfigError, match=r"reward\.sources\.brief: .*no_such"):
        said(brief={"name": "rules", "rules": [{"function": "no_such:rule"}]})
    with pytest.raises(ConfigError, match=r"reward\.sources\.remote: .*127\.0\.0\.1:9"):
        said(remote={"name": "http", "url": "http://127.0.0.1:9/x", "retries": 0})
    longest = {"path": str(scorer), "max_length": window_of(scorer) + 1}
    config = config_of(tmp_path, {"name": "weighted", "sources": {**sources, "long": longest}})
    with pytest.raises(ConfigError, match=r"reward\.sources\.long\.max_length=\d+ exceeds"):
        window_note(config)
    uses = {use.key: use.model for use in reward_uses(config)}
    assert uses == {"reward.sources.quality.path": str(scorer), "reward.sources.long.path": str(scorer)}
    assert reward_inputs(config).rules == {length["function"]}


def test_a_rule_whose_package_is_missing_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of(tmp_path, {"name": "rules", "rules": [{"function": "actors.rewards.rules:math_answer"}]})
    examples = rollout_table(["#### 1"], metas=[{"answer": "1"}])
    with pytest.raises(
        ConfigError, match=r"rule math_answer: ImportError: needs the package math-verify .* reward\.rules"
    ):
        check_reward(config, Found(None, None, examples))


def test_a_step_with_cut_transcripts_says_so_in_its_line(tmp_path: Path) -> None:
    said: list[str] = []
    telemetry = Telemetry(tmp_path, "run", 1, console=said.append)
    for cut in (0.0, 3.0):
        with telemetry.step(int(cut)) as record:
            record({"reward/mean": 0.5, "reward/cut": cut})
    assert "cut" not in said[0] and "3 transcripts cut for the reward model" in said[1]
