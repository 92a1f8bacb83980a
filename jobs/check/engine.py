"""Whether the chosen rollout engine can be had here, before anything starts."""

from __future__ import annotations

import importlib.util

from orchestrator.config.config import Config
from orchestrator.errors import ConfigError


def check_engine(config: Config) -> None:
    """Raises ConfigError when the engine's library is not installed."""
    if config.has_rollouts and config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine='vllm', and vLLM is not installed here. Set rollout.engine=hf or auto to sample with "
            "transformers, or install the locked set on Linux: make setup."
        )
