"""Preflight: checks that the models of a run can be loaded, computed with and exported. Uses configs, headers of files,
and small random models of the same architectures; no weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.models.classifiers import as_scorer
from actors.models.files import read_config, read_headers, require_weights, window
from actors.models.miniature import prove_small
from actors.models.model import resolve_model
from actors.models.reward_heads import require_heads
from actors.models.size import model_size
from actors.text.tokenizing import has_tokenizer, load_tokenizer
from jobs.stages.stage import ModelUse
from jobs.stages.table import stages_of
from orchestrator.config.config import Config
from orchestrator.config.sections import LoraConfig
from orchestrator.errors import ConfigError

HEAD = "score."


def check_models(config: Config) -> str | None:
    """Checks each use of a model; roles that use a folder in the same way share a check.

    Raises:
        DataError, ConfigError: name the model and a remedy.
    """
    uses_of: dict[tuple[Path, bool, bool, LoraConfig], list[ModelUse]] = {}
    for use in _uses(config):
        folder = resolve_model(use.model, config.run.cache)
        settings = read_config(folder, trust_remote_code=config.model.trust_remote_code)
        _require_size(config, use, folder, settings)
        if use.heads is not None and (head := read_headers(folder).get(f"{HEAD}weight")) is not None:
            require_heads(head.shape[0], use.heads, folder)
        uses_of.setdefault((folder.resolve(), use.scores, use.checkpointing, use.lora), []).append(use)
    tried = [_describe(uses, is_tried=_prove(config, uses)) for uses in uses_of.values()]
    return f"models: weights are whole; {', '.join(tried)}"


def _describe(uses: Sequence[ModelUse], *, is_tried: bool) -> str:
    keys = " and ".join(use.key for use in uses)
    if not is_tried:
        return f"{keys} will be proved when loaded"
    adapters = ", with adapters" if uses[0].lora.rank else ""
    return f"{keys} {'were' if len(uses) > 1 else 'was'} tried small{adapters}"


def _uses(config: Config) -> Iterator[ModelUse]:
    """Each use once: stages share the policy. If one of them exports it, the export is checked for all."""
    uses = [use for entry in stages_of(config) for use in entry.stage.models(entry.config)]
    exported = {replace(use, exports=True) for use in uses if use.exports}
    yield from dict.fromkeys(wider if (wider := replace(use, exports=True)) in exported else use for use in uses)


def _prove(config: Config, uses: Sequence[ModelUse]) -> bool:
    """Whether the weights are complete and the proofs succeed. A use that exports includes all proofs of one that does
    not. False: no small model could be made."""
    use, trust = uses[0], config.model.trust_remote_code
    folder = resolve_model(use.model, config.run.cache)
    settings = read_config(folder, trust_remote_code=trust)
    loader: Any = AutoModelForSequenceClassification if use.scores else AutoModelForCausalLM
    if use.scores:
        as_scorer(settings)
    require_weights(folder, loader, settings, read_headers(folder), may_lack=HEAD if use.scores else None)
    exports = any(use.exports for use in uses) and has_tokenizer(folder)
    return prove_small(
        folder,
        settings,
        load_tokenizer(folder, trust_remote_code=trust) if exports else None,
        scores=use.scores,
        checkpointing=use.checkpointing,
        exports=exports,
        lora=use.lora,
    )


def _require_size(config: Config, use: ModelUse, folder: Path, settings: Any) -> None:
    if use.layers is not None:  # checks that the cut model can be built
        model_size(folder, layers=use.layers, trust_remote_code=config.model.trust_remote_code)
    _require_window(use, folder, settings)


def _require_window(use: ModelUse, folder: Path, settings: Any) -> None:
    there = window(settings)
    if use.window is not None and there is not None and use.window > there:
        raise ConfigError(
            f"{use.window_key}={use.window} exceeds what {use.key} takes: {folder} has {there} positions. Set "
            f"{use.window_key}={there} or less, or give a model with a longer window."
        )
