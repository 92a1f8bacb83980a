"""Preflight: can the models of a run be loaded, computed with and exported? From configs and headers of files, and by
small random models of the same architectures; no weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.learning.files import read_config, read_headers, require_weights, window
from actors.learning.miniature import prove_small
from actors.learning.model import resolve_model
from actors.learning.size import model_size
from actors.tokenizing import has_tokenizer, load_tokenizer
from orchestrator.config import Config
from orchestrator.errors import ConfigError

HEAD = "score."


@dataclass(frozen=True)
class _Use:
    """What a run wants of one model.

    Args:
        key: of the config; names the model in errors.
        window: positions that it must take. None: longer input is cut.
        layers: that are kept, from the first on. None: all.
        new_head: a scalar head is made where there is none.
    """

    key: str
    model: str
    scores: bool
    window: int | None
    learns: bool = False
    checkpointing: bool = False
    exports: bool = False
    layers: int | None = None
    new_head: bool = False


def check_models(config: Config) -> str | None:
    """Raises DataError or ConfigError naming the model and the way out."""
    tried: list[str] = []
    for use in _distinct(_uses(config)):
        folder = resolve_model(use.model, config.run.cache)
        tried.append(f"{use.key} {'was tried small' if _check(config, use, folder) else 'will be proved when loaded'}")
    return f"models: weights are whole; {', '.join(tried)}"


def _uses(config: Config) -> Iterator[_Use]:
    longest, policy, stages = config.model.max_length, config.policy, config.stages
    if config.has_rollouts:
        yield _Use(
            "model.path",
            config.model.path,
            scores=False,
            window=longest,
            learns="ppo" in stages,
            checkpointing=policy.gradient_checkpointing,
            exports="ppo" in stages,
        )
    if "ppo" in stages:
        if config.reference.path is not None:
            yield _Use("reference.path", config.reference.path, scores=False, window=longest)
        if config.reward.kind == "model" and config.reward.path is not None:
            # That it has a head is checked with its statistics.
            yield _Use("reward.path", config.reward.path, scores=True, window=None, new_head=True)
        if config.ppo.has_critic:
            yield _critic(config, longest)
    if "reward_model" in stages:
        base = config.reward_model.base or config.model.path
        layers = config.reward_model.layers
        yield _Use(
            "reward_model.base", base, scores=True, window=None, learns=True, exports=True, layers=layers, new_head=True
        )


def _critic(config: Config, longest: int) -> _Use:
    base = config.reward_model.base if config.reward.kind == "model" else None
    starts = (
        ("critic.path", config.critic.path),
        ("reward.path", config.reward.path),
        ("reward_model.base", base),
        ("model.path", config.model.path),
    )
    key, path = next((key, path) for key, path in starts if path is not None)
    return _Use(
        f"critic ({key})",
        path,
        scores=True,
        window=longest,
        learns=True,
        checkpointing=config.critic.gradient_checkpointing,
        new_head=True,
    )


def _distinct(uses: Iterator[_Use]) -> list[_Use]:
    return list(dict.fromkeys(uses))


def _check(config: Config, use: _Use, folder: Path) -> bool:
    trust = config.model.trust_remote_code
    settings = read_config(folder, trust_remote_code=trust)
    if use.layers is not None:
        model_size(folder, layers=use.layers, trust_remote_code=trust)  # that the cut model can be built
    _require_window(use, folder, settings)
    loader: Any = AutoModelForSequenceClassification if use.scores else AutoModelForCausalLM
    if use.scores:
        settings.num_labels = 1
    require_weights(folder, loader, settings, read_headers(folder), may_lack=HEAD if use.new_head else None)
    exports = use.exports and has_tokenizer(folder)
    return prove_small(
        folder,
        settings,
        load_tokenizer(folder, trust_remote_code=trust) if exports else None,
        scores=use.scores,
        checkpointing=use.checkpointing,
        exports=exports,
    )


def _require_window(use: _Use, folder: Path, settings: Any) -> None:
    there = window(settings)
    if use.window is not None and there is not None and use.window > there:
        raise ConfigError(
            f"model.max_length={use.window} exceeds what {use.key} takes: {folder} has {there} positions. Set "
            f"model.max_length={there} or less, or give a model with a longer window."
        )
