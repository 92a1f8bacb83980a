"""States of a run's reward model for its samples, computed in this process, for `rlhf label add --choose active`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from actors.rewards import RewardContext
from actors.rewards.model import build
from actors.text.templates import read_template
from jobs.services.labelling.items.sources import sample_files
from orchestrator.config.config import Config
from orchestrator.config.loader import load_kept_config
from orchestrator.config.rewards import ModelRewardConfig
from orchestrator.errors import ConfigError, DataError
from orchestrator.run.folder import CONFIG_FILE

_BATCH = 64


def states_of(
    folder: Path, *, stage: str | None, step: int | None, model: Path | None, say: Callable[[str], None]
) -> pa.Table:
    """Table of schema.STATES for the samples of a run, in their order.

    Args:
        model: the reward model; None: the run's own, the newest one.

    Raises:
        ConfigError: the folder is no run.
        DataError: there is no reward model, or it or the samples can't be read.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"--choose active needs the folder of a run, with its {CONFIG_FILE}; {folder} is none.")
    files = sample_files(folder, stage=stage, step=step)
    try:
        samples = pa.concat_tables(pq.read_table(file) for file in files)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{files[0]}: samples can't be read ({error}).") from None
    reward_model = build(*_arguments(load_kept_config(folder / CONFIG_FILE), folder, model))
    found = []
    for start in range(0, samples.num_rows, _BATCH):
        found.append(reward_model.states(samples.slice(start, _BATCH)))
        say(f"the reward model has read {min(start + _BATCH, samples.num_rows)} of {samples.num_rows} samples")
    return pa.concat_tables(found)


def _arguments(config: Config, folder: Path, model: Path | None) -> tuple[ModelRewardConfig, RewardContext]:
    """A model that is given may take more than the run's own was trained with."""
    longest = config.reward_model.max_length if model is None else None
    source = ModelRewardConfig(path=str(model or _newest(folder)), normalise=False, max_length=longest)
    template = config.model.chat_template
    context = RewardContext(
        policy=config.model,
        template=None if template is None else read_template(template),
        cache=config.run.cache,
        limits=config.rule_limits,
        total_s=config.deadlines.score_s,
        threads=torch.get_num_threads(),
    )
    return source, context


def _newest(folder: Path) -> Path:
    found = [*folder.glob("reward-model/config.json"), *folder.glob("stages/*/reward-model/config.json")]
    if not found:
        raise DataError(
            f"{folder} holds no reward model: run a stage `reward_model` with reward_model.heads=5, give one with "
            "--reward-model, or --choose random."
        )
    return max(found, key=lambda file: file.stat().st_mtime).parent
