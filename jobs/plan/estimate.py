"""Estimates the duration of a run on this machine from the machine's measured speed and the simulator.

The time of a stage is that of starting its processes and of its work. The work is computed by
orchestrator/planning/costs.py, and the steps of PPO by the simulated loop. All times are for an otherwise idle machine
without GPUs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from actors.machine.probe import Speed, machine_speed
from actors.training.reward_model import CALIBRATION_REPLIES
from jobs.plan.work import layout_of, learn_settings, models_of, trained_reward_size, work_of
from jobs.prepare import Prepared, prepare
from jobs.resolve import WITHOUT_TRIAL, resolved
from jobs.stages.stage import RowSizes
from jobs.stages.table import stages_of
from orchestrator.config.config import Config
from orchestrator.config.trainings import OfflineConfig
from orchestrator.planning.costs import (
    Dimensions,
    LearnSettings,
    Lengths,
    generate_seconds,
    learn_seconds,
    score_seconds,
)
from orchestrator.planning.hardware import Device, cpu_core
from orchestrator.planning.simulation.run import simulate_steps
from orchestrator.planning.simulation.scenario import Layout
from orchestrator.prompts import HELD_OUT_FRACTION
from orchestrator.training.ranking import spread
from orchestrator.types import Prompt
from orchestrator.watching.telemetry import clock_text

# Seconds until Ray is up. Together with the starts of stages (Stage.start_s) it is the time of a quickstart of 8:13
# minutes on two cores that was not work; the share of each is a guess.
RAY_START_S = 10.0
_SIMULATED_STEPS = 3
_ENOUGH_CACHE = 1e9
_MEASURED = 10_000  # prompts
BUSY = 0.7  # share of the cores, in runnable processes


@dataclass(frozen=True)
class Estimate:
    """Seconds of each part of a run, on this machine if it is otherwise idle."""

    speed: Speed
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def describe(self) -> str:
        parts = ", ".join(f"{name.replace('_', ' ')} {clock_text(seconds)}" for name, seconds in self.parts.items())
        return f"about {clock_text(self.seconds)} min on this machine if it is otherwise idle ({parts})"


def expected(config: Config) -> str:
    """A description of a config's estimate. Raises errors of reading its prompts and models."""
    config = resolved(config, tell=lambda line: None, keys=WITHOUT_TRIAL)
    found = estimate(config, prepare(config))
    text = f"model.dtype={config.model.dtype}: {found.speed.describe()}\nthis takes {found.describe()}"
    load = os.getloadavg()[0]
    if load > found.speed.threads * BUSY:
        text += f"; {load:.0f} processes compute here now, so it will take longer"
    return text


def estimate(config: Config, prepared: Prepared) -> Estimate:
    """The estimate of a resolved config on the CPUs of this machine.

    Raises:
        DataError: a model can't be found, or its architecture is unknown.
    """
    speed = machine_speed(config.run.cache)
    dtype = config.model.compute_dtype
    device = cpu_core(dtype, speed.per_core(dtype))
    parts = {
        entry.name: entry.stage.start_s
        + entry.stage.seconds(Costs(entry.config, device, speed.threads), prepared.of(entry.config))
        for entry in stages_of(config)
    }
    return Estimate(speed, {"ray": RAY_START_S, **parts})


class Costs:
    """Work of a config's stages in seconds, on `cores` devices."""

    def __init__(self, config: Config, device: Device, cores: int) -> None:
        self.config = config
        self._models = models_of(config)
        self._layout: Layout = layout_of(config, device, cores)
        self._device, self._cores = device, cores

    def sampling(self, prompts: Sequence[Prompt], replies_per_prompt: int) -> float:
        return self._generate(np.repeat(_lengths(prompts), replies_per_prompt)) / self._layout.engines

    def reward_model(self, prompts: Sequence[Prompt]) -> float:
        """Training and scoring afterwards. Preferences of a file count as the labeller's."""
        stage, sample = self.config.reward_model, self.config.sample
        size = trained_reward_size(self.config)
        replies = sample.samples_per_prompt
        chosen = _lengths(prompts[: sample.prompts]) + self.config.longest_response
        num_train = math.ceil(len(chosen) * (1.0 - HELD_OUT_FRACTION))
        scored = len(chosen) - num_train + CALIBRATION_REPLIES // replies
        batches = math.ceil(num_train / stage.records_per_batch)
        settings = learn_settings(stage, size, epochs=stage.epochs, minibatches=batches)
        training = learn_seconds(
            size,
            self._device,
            settings,
            ranks=self._cores,
            lengths=np.repeat(chosen[:num_train], replies),
            head_tokens=0.0,
        )
        return training + self._score(size, np.repeat(chosen[:scored], replies), stage.micro_batch_tokens)

    def sft(self, rows: RowSizes) -> float:
        """Training, and the loss of held-out rows."""
        stage = self.config.sft
        return self._policy_training(stage, rows) + self._policy_forwards(stage, rows, HELD_OUT_FRACTION)

    def preference(self, rows: RowSizes) -> float:
        """Training; the reference's log-probs of all rows, with KTO also of mismatched ones, under the policy too; and
        the implicit rewards of held-out rows."""
        stage = self.config.preference
        reference = (1.0 + HELD_OUT_FRACTION) * stage.loss.needs_reference
        mismatched = 2.0 * stage.epochs * (stage.loss.judgement == "labels")
        forwards = reference + mismatched + HELD_OUT_FRACTION
        return self._policy_training(stage, rows) + self._policy_forwards(stage, rows, forwards)

    def _policy_training(self, stage: OfflineConfig, rows: RowSizes) -> float:
        size, whole = self._size("policy"), rows.lengths
        batches = math.ceil(rows.num_records / stage.records_per_batch)
        settings = learn_settings(stage, size, epochs=stage.epochs, minibatches=batches)
        return learn_seconds(
            size,
            self._device,
            settings,
            ranks=self._cores,
            lengths=whole,
            head_tokens=rows.learned * whole.sum(),
        )

    def _policy_forwards(self, stage: OfflineConfig, rows: RowSizes, times: float) -> float:
        """So many times the rows of the training, without gradient."""
        whole = np.resize(rows.lengths, math.ceil(len(rows.lengths) * times))
        return self._score(self._size("policy"), whole, stage.micro_batch_tokens, rows.learned * whole.sum())

    def rl(self, train: Sequence[Prompt], held_out: Sequence[Prompt]) -> float:
        steps = self.config.rl.steps
        mean = float(_lengths(train).mean())
        work = work_of(self.config, prompt_tokens=mean, response_tokens=None, deviation=0.0)
        simulated = simulate_steps(
            replace(work, models=self._models), self._layout, cache_tokens=_ENOUGH_CACHE, steps=_SIMULATED_STEPS
        )
        seconds = steps * float(np.mean([step["time/step_s"] for step in simulated[1:]]))
        evaluations = 2 if self.config.evaluation.prompts else 0
        return seconds + evaluations * self._evaluation(held_out[: self.config.evaluation.prompts])

    def _evaluation(self, prompts: Sequence[Prompt]) -> float:
        """Sampling, then policy, reference and reward at once on shared cores."""
        chosen, longest = _lengths(prompts), self.config.longest_response
        whole = chosen + longest
        head_tokens = float(len(chosen) * longest)
        scoring = 0.0
        for role in ("policy", "reference", "reward"):
            size = self._models[role]
            if size is not None:
                tokens = self._layout.learning[role].micro_batch_tokens
                scoring += self._score(size, whole, tokens, 0.0 if role == "reward" else head_tokens)
        return self._generate(chosen) + scoring

    def _generate(self, prompts: Lengths) -> float:
        """All shards on one engine."""
        size, longest = self._size("policy"), self.config.longest_response
        shard = self._layout.samples_per_shard
        return sum(
            generate_seconds(
                size,
                self._device,
                width=self._layout.width("rollout"),
                prompt_tokens=prompts[start : start + shard],
                new_tokens=np.full(len(prompts[start : start + shard]), longest),
                cache_tokens=_ENOUGH_CACHE,
            )
            for start in range(0, len(prompts), shard)
        )

    def _score(self, size: Dimensions, lengths: Lengths, micro_batch_tokens: int, head_tokens: float = 0.0) -> float:
        """On all cores, by one or several processes."""
        settings = LearnSettings(0, micro_batch_tokens=micro_batch_tokens)
        return score_seconds(
            size, self._device, settings, ranks=self._cores, lengths=lengths, head_tokens=head_tokens, evenly=True
        )

    def _size(self, role: str) -> Dimensions:
        found = self._models[role] or self._models["policy"]
        if found is None:
            raise ValueError("a run without a policy is no run")
        return found


def _lengths(prompts: Sequence[Prompt]) -> Lengths:
    """Those of some prompts stand for all."""
    measured = np.asarray([len(prompt.tokens) for prompt in spread(prompts, _MEASURED)], dtype=np.int64)
    return np.resize(measured, len(prompts))
