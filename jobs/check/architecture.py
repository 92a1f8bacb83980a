"""Whether vLLM serves the policy's architecture: checked before anything starts, and without the policy's weights."""

from __future__ import annotations

from jobs.check.engine_trial import verdict_on_vllm
from orchestrator.config.config import Config
from orchestrator.errors import ConfigError


def check_architecture(config: Config) -> str | None:
    """Raises ConfigError: vLLM does not know the architecture, computes something else, or can't be given its weights.

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
        return f"engine: vLLM was not tried on this architecture ({verdict.untried}); its first publish will tell"
    return f"engine: vLLM serves this architecture; log-probs differ from transformers' by {verdict.difference:.1g}"
