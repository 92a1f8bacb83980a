from __future__ import annotations

from typing import Any

import pytest

from jobs.stages.settings import experience_settings, rank_context, transport_of
from orchestrator.config.loader import config_from_tree

ON_GPUS: dict[str, Any] = {"policy": {"gpus_per_rank": 1}, "rollout": {"gpus_per_replica": 1}}


@pytest.mark.parametrize(
    ("sections", "transport"),
    [
        ({}, "shared"),
        ({"publish": {"transport": "collective"}}, "collective"),
        ({"publish": {"transport": "shared"}}, "shared"),
        (ON_GPUS, "shared"),
        ({**ON_GPUS, "placement": {"mode": "separate"}}, "collective"),
        ({**ON_GPUS, "rollout": {"gpus_per_replica": 1, "engine": "hf"}}, "shared"),
        ({"rollout": {"gpus_per_replica": 1}}, "host"),
    ],
)
def test_the_transport_follows_from_devices_and_placement(sections: dict[str, Any], transport: str) -> None:
    tree = {"reward": {"path": "/models/reward"}, **sections}
    assert transport_of(config_from_tree(tree, source="test"), one_host=True) == transport


def test_cpus_of_several_hosts_share_no_memory() -> None:
    config = config_from_tree({"reward": {"path": "/models/reward"}}, source="test")
    assert transport_of(config, one_host=False) == "host"


def test_the_longest_response_is_that_of_all_turns() -> None:
    """Penalties of length and the constant of the aggregation count the tokens of a whole episode."""
    tree: dict[str, Any] = {"reward": {"path": "/m"}, "model": {"dtype": "float32", "max_length": 512}}
    tree["rollout"] = {"max_new_tokens": 64}
    environment = {"name": "actors.environments.word_game:WordGame", "max_turns": 3}
    for more, longest in (({}, 64), ({"environment": environment}, 192)):
        config = config_from_tree({**tree, **more}, source="test")
        assert experience_settings(config).max_new_tokens == rank_context(config).max_new_tokens == longest
