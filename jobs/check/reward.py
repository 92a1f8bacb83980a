"""Preflight: how long a transcript the reward model takes, and which would lose their start."""

from __future__ import annotations

from actors.learning.files import read_config, window
from actors.learning.model import resolve_model
from jobs.stages.settings import reward_base, reward_max_length
from orchestrator.config.config import Config
from orchestrator.config.rewards import ModelRewardConfig
from orchestrator.errors import ConfigError


def check_reward_window(config: Config) -> str | None:
    """Says what the reward model takes where that is less than a prompt and its response may have.

    Raises:
        ConfigError: reward.max_length exceeds the window of the reward model.
    """
    if "ppo" not in config.stages or not isinstance(config.reward, ModelRewardConfig):
        return None
    model, _ = reward_base(config)
    folder = resolve_model(model, config.run.cache)
    there = window(read_config(folder, trust_remote_code=config.model.trust_remote_code))
    wanted = config.reward.max_length
    if wanted is not None and there is not None and wanted > there:
        raise ConfigError(
            f"reward.max_length={wanted} exceeds what the reward model takes: {folder} has {there} positions. Set "
            f"reward.max_length={there} or less, or leave it out."
        )
    taken = min((n for n in (reward_max_length(config), there) if n), default=None)
    if taken is None or taken >= config.model.max_length:
        return None
    return (
        f"reward model: takes the last {taken} tokens of a transcript, which may have model.max_length="
        f"{config.model.max_length} and more in its own template; those that lose their start are counted in reward/cut"
    )
