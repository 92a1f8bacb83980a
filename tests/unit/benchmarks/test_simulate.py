"""Calibration with runs of known efficiencies, and the setups of other frameworks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.calibration import FITTED, Run, as_arguments, calibrate, errors, predicted
from orchestrator.planning.costs import Dimensions, LearnSettings
from orchestrator.planning.hardware import CPU_CORE, Efficiency
from orchestrator.planning.simulation.scenario import MODELS, Layout, Measured, Pool, Spread

SIZE = Dimensions(134_515_008, 30, 576, 1536, 49_152, kv_width=192, tied=True)
TRUE = replace(CPU_CORE.efficiency, learn=0.2, forward=0.3, decode_step_s=0.05, step_s=0.6)


def run_of(rows: int, tokens: int, efficiency: Efficiency) -> Run:
    """One step as measured on a machine of this efficiency."""
    lengths = (np.full(rows, 24), np.full(rows, tokens))
    work = Measured(dict.fromkeys(MODELS, SIZE), rows, Spread(1, 1), Spread(1, 1), (lengths,))
    widths = dict.fromkeys(MODELS, 1) | {"rollout": 2}
    learning = dict.fromkeys(MODELS, LearnSettings(minibatches=4, micro_batch_tokens=1024))
    run = Run("made up", work, Layout(CPU_CORE, (Pool(2, widths),), 1, 64, learning=learning), [{}])
    return replace(run, seconds=predicted(run, efficiency))


def test_a_fit_to_one_run_predicts_another() -> None:
    efficiency = calibrate([run_of(64, 28, TRUE), run_of(32, 28, TRUE)], CPU_CORE.efficiency)
    for told, measured, error in errors(run_of(64, 56, TRUE), efficiency).values():
        assert abs(error) < 0.05, (told, measured)


def test_an_efficiency_is_printed_as_it_stands_in_the_table() -> None:
    text = as_arguments(CPU_CORE.efficiency)
    assert eval(f"Efficiency({text})", {"Efficiency": Efficiency}) == CPU_CORE.efficiency


def test_a_run_is_cut_with_its_lengths() -> None:
    run = run_of(32, 28, TRUE)
    assert run.part(slice(0, 0), "none").work.of_step == ()
    assert set(run.seconds[0]) == set(FITTED)


def test_setups_of_peers_use_the_gpus_that_they_name() -> None:
    for published in peers.published():
        assert f", {published.layout.devices} " in published.name
        assert published.layout.engines * published.layout.width("rollout") <= published.layout.devices


def test_cut_lengths_keep_the_published_mean() -> None:
    spread = peers.mean_after_cut(3206, 3986)
    assert spread.draw(20_000, (1,)).mean() == pytest.approx(3206, rel=0.01)
