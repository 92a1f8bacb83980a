"""Preflight: can the models of a run be loaded, computed with and exported? From configs and headers of files, and by
small random models of the same architectures; no weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.learning.files import read_config, read_headers, require_weights, window
from actors.learning.miniature import prove_small
from actors.learning.model import resolve_model
from actors.learning.size import model_size
from actors.text.tokenizing import has_tokenizer, load_tokenizer
from orchestrator.config.config import Config
from orchestrator.config.rewards import ModelRewardConfig
from orchestrator.errors import ConfigError

HEAD = "score."


@dataclass(frozen=True)
class _Use:
    """What a run wants of one model.

    Args:
        key: of the config; names the model in errors.
        scores: with a scalar head, which is made where there is none.
        window: positions that it must take. None: longer input is cut.
        layers: that are kept, from the first on. None: all.
    """

    key: str
    model: str
    scores: bool
    window: int | None
    checkpointing: bool = False
    exports: bool = False
    layers: int | None = None


def check_models(config: Config) -> str | None:
    """Roles that use one folder in one way share a proof of it.

    Raises:
        DataError, ConfigError: naming the model and the way out.
    """
    uses_of: dict[tuple[Path, bool, bool], list[_Use]] = {}
    for use in _uses(config):
        folder = resolve_model(use.model, config.run.cache)
        settings = read_config(folder, trust_remote_code=config.model.trust_remote_code)
        _require_size(config, use, folder, settings)
        uses_of.setdefault((folder.resolve(), use.scores, use.checkpointing), []).append(use)
    tried = [_describe(uses, is_tried=_prove(config, uses)) for uses in uses_of.values()]
    return f"models: weights are whole; {', '.join(tried)}"


def _describe(uses: Sequence[_Use], *, is_tried: bool) -> str:
    keys = " and ".join(use.key for use in uses)
    if not is_tried:
        return f"{keys} will be proved when loaded"
    return f"{keys} {'were' if len(uses) > 1 else 'was'} tried small"


def _uses(config: Config) -> Iterator[_Use]:
    longest, policy, stages = config.model.max_length, config.policy, config.stages
    if config.has_rollouts:
        yield _Use(
            "model.path",
            config.model.path,
            scores=False,
            window=longest,
            checkpointing=policy.gradient_checkpointing,
            exports="ppo" in stages,
        )
    if "ppo" in stages:
        if config.reference.path is not None:
            yield _Use("reference.path", config.reference.path, scores=False, window=longest)
        if (reward := _reward(config)) is not None and reward.path is not None:
            # That it has a head is checked with its statistics.
            yield _Use("reward.path", reward.path, scores=True, window=None)
        if config.algorithm.needs_critic:
            yield _critic(config, longest)
    if "reward_model" in stages:
        base = config.reward_model.base or config.model.path
        layers = config.reward_model.layers
        yield _Use("reward_model.base", base, scores=True, window=None, exports=True, layers=layers)


def _reward(config: Config) -> ModelRewardConfig | None:
    return config.reward if isinstance(config.reward, ModelRewardConfig) else None


def _critic(config: Config, longest: int) -> _Use:
    reward = _reward(config)
    starts = (
        ("critic.path", config.critic.path),
        ("reward.path", reward.path if reward else None),
        ("reward_model.base", config.reward_model.base if reward else None),
        ("model.path", config.model.path),
    )
    key, path = next((key, path) for key, path in starts if path is not None)
    return _Use(
        f"critic ({key})",
        path,
        scores=True,
        window=longest,
        checkpointing=config.critic.gradient_checkpointing,
    )


def _prove(config: Config, uses: Sequence[_Use]) -> bool:
    """Whether the weights are whole and what is relied on holds, for uses that differ in what proofs include: one that
    exports proves all that one that doesn't would. False where no small model could be made."""
    use, trust = uses[0], config.model.trust_remote_code
    folder = resolve_model(use.model, config.run.cache)
    settings = read_config(folder, trust_remote_code=trust)
    loader: Any = AutoModelForSequenceClassification if use.scores else AutoModelForCausalLM
    if use.scores:
        settings.num_labels = 1
    require_weights(folder, loader, settings, read_headers(folder), may_lack=HEAD if use.scores else None)
    exports = any(use.exports for use in uses) and has_tokenizer(folder)
    return prove_small(
        folder,
        settings,
        load_tokenizer(folder, trust_remote_code=trust) if exports else None,
        scores=use.scores,
        checkpointing=use.checkpointing,
        exports=exports,
    )


def _require_size(config: Config, use: _Use, folder: Path, settings: Any) -> None:
    if use.layers is not None:  # that the cut model can be built
        model_size(folder, layers=use.layers, trust_remote_code=config.model.trust_remote_code)
    _require_window(use, folder, settings)


def _require_window(use: _Use, folder: Path, settings: Any) -> None:
    there = window(settings)
    if use.window is not None and there is not None and use.window > there:
        raise ConfigError(
            f"model.max_length={use.window} exceeds what {use.key} takes: {folder} has {there} positions. Set "
            f"model.max_length={there} or less, or give a model with a longer window."
        )
