"""Checks whether engine and kernels are available, and whether vLLM serves the policy's architecture: before anything
starts, and without the policy's weights."""

from __future__ import annotations

import importlib.util

from actors.models.model import resolve_model
from actors.models.size import divided_sizes
from jobs.check.engine_trial import verdict_on_vllm
from jobs.stages.table import samples_prompts
from orchestrator.config.config import Config
from orchestrator.errors import ConfigError
from orchestrator.planning.widths import Divided


def check_engine(config: Config) -> None:
    """Raises ConfigError if the engine's library is not installed."""
    if samples_prompts(config) and config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine='vllm', and vLLM is not installed here. Set rollout.engine=hf or auto to sample with "
            "transformers, or install the locked set on Linux: make setup."
        )


def check_width(config: Config) -> None:
    """Raises ConfigError if vLLM can't divide the policy over the devices of an engine."""
    width, divided = config.rollout.tensor_parallel_size, divided_of(config)
    if misfits := list(divided.misfits(width)):
        raise ConfigError(
            f"rollout.tensor_parallel_size={width} does not divide model.path={config.model.path}, and vLLM would "
            f"refuse it: {', '.join(misfits)}. Set it to one of {', '.join(map(str, divided.widths))}."
        )


def divided_of(config: Config) -> Divided:
    """What the workers of an engine divide. Raises DataError if the model's config can't be read."""
    folder = resolve_model(config.model.path, config.run.cache)
    return divided_sizes(folder, trust_remote_code=config.model.trust_remote_code)


def check_kernels(config: Config) -> str | None:
    """A note if Liger's kernels are wanted and not installed here: the machines with GPUs are mostly others."""
    wanted = [name for name in type(config).model_fields if getattr(getattr(config, name), "liger", False)]
    if not wanted or importlib.util.find_spec("liger_kernel") is not None:
        return None
    return (
        f"{', '.join(f'{name}.liger' for name in wanted)}: package liger-kernel is not installed here, and the nodes "
        "with GPUs need it. requirements/gpu.txt has it; otherwise pip install 'rlhf-orchestrator[liger]' there"
    )


def check_architecture(config: Config) -> str | None:
    """Raises ConfigError if vLLM does not support the architecture, computes other results, or can't load its weights.

    Engines on GPUs are not tried.
    """
    verdict = verdict_on_vllm(config) if config.rollout.engine == "vllm" else None
    if verdict is None:
        return None
    if verdict.refusal is not None:
        raise ConfigError(
            f"rollout.engine=vllm can't serve model.path={config.model.path}: {verdict.refusal.rstrip('.')}. "
            "Set rollout.engine=hf: it serves every causal LM of transformers, more slowly."
        )
    if verdict.untried is not None:
        return f"engine: vLLM was not tried on this architecture ({verdict.untried}); the first publish will verify it"
    return f"engine: vLLM serves this architecture; log-probs differ from transformers' by {verdict.difference:.1g}"
