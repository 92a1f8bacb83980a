"""The shipped configs for GPUs fit on theirs, by `check` and by `plan`, and fill them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.check.capacity import Capacity, Cluster, capacity, gpu_memory_of
from jobs.command import out
from jobs.plan.report import MeanLengths, Target, plan, show_configured
from jobs.plan.work import layout_of, work_of
from orchestrator.config.config import Config
from orchestrator.config.loader import load_config
from orchestrator.errors import CapacityError
from orchestrator.planning.hardware import device_of
from orchestrator.planning.memory import GIB
from orchestrator.planning.needs import NodeOffer
from orchestrator.planning.placement import Node
from orchestrator.planning.simulation.fit import memory_per_device

CONFIGS = Path("jobs/configs")
QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "dtype": "bfloat16",
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
H100_BYTES = 80e9


@dataclass(frozen=True)
class Case:
    """A config, the shape of its model, and nodes as (CPUs, GPUs, host memory in GiB)."""

    file: str
    shape: str
    nodes: tuple[tuple[float, float, float], ...]

    @property
    def gpus(self) -> int:
        return int(sum(gpus for _, gpus, _ in self.nodes))

    def config(self, folder: Path, *overrides: str) -> Config:
        (folder / "config.json").write_text(json.dumps({**QWEN, **SHAPES[self.shape]}))
        settings = [f"model.path={folder}", "model.dtype=bfloat16", "rollout.engine=vllm", *overrides]
        return load_config(CONFIGS / self.file, settings)

    def capacity(self, config: Config, gpu_memory: float | None = H100_BYTES) -> Capacity:
        nodes = [Node(f"node-{number}", cpus, gpus) for number, (cpus, gpus, _) in enumerate(self.nodes)]
        offers = {
            node.address: NodeOffer(memory * GIB, gpu_memory if node.gpus else None)
            for node, (_, _, memory) in zip(nodes, self.nodes, strict=True)
        }
        return capacity(config, Cluster("a toy", nodes, offers))


TRAINERS, ROLLOUTS = ((40, 5, 400),) * 2, ((6, 1, 64),) * 6  # the pods of k8s/overlays/gpu
EIGHT = Case("h100-8.yaml", "7B", ((128, 8, 1000),))
CASES = [
    Case("h100-1.yaml", "0.5B", ((16, 1, 120),)),
    Case("h100-1.yaml", "1.5B", ((16, 1, 120),)),
    EIGHT,
    Case("gpu.yaml", "7B", (*TRAINERS, *ROLLOUTS)),
]
BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file} {case.shape}")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out, "width", 220)


@BY_NAME
def test_every_stage_has_its_place_and_its_memory(case: Case, tmp_path: Path) -> None:
    found = case.capacity(case.config(tmp_path))
    assert found.warnings == []
    assert len(found.plan.gpus) == case.gpus
    fullest = max(need.needed for need in found.nodes if not need.is_of_host)
    assert 0.7 * H100_BYTES < fullest < H100_BYTES


@BY_NAME
def test_the_plan_tells_its_time_and_memory_as_it_is(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = case.config(tmp_path)
    work = work_of(config, prompt_tokens=300.0, response_tokens=500.0, deviation=0.5)
    show_configured(config, work, Target(case.gpus, "h100", None, None, None))
    text = capsys.readouterr().out
    assert "the config as it is: " in text and "s a step" in text
    assert "KV cache" in text
    assert ": memory needed about " in text and "available unknown" in text


def test_an_engine_with_the_default_share_does_not_fit_beside_the_models_of_7b(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EIGHT.config(tmp_path, "rollout.gpu_memory_utilization=0.85")
    with pytest.raises(CapacityError, match=r"phase sample 8\d.\d GiB .*utilization=0.6\d? would leave") as error:
        EIGHT.capacity(config)
    assert "a GPU of node-0 has 74.5 GiB" in str(error.value)
    plan(config, Target(8, "h100", None, None, None), MeanLengths(300.0, 500.0, 0.5))
    text = capsys.readouterr().out
    assert "the config as it is does not fit: policy, critic, reference, reward, rollout on one h100: sample 8" in text
    assert "Use rollout.gpu_memory_utilization=0.6" in text
    assert "\nbest: placement.mode=colocated" in text


def test_the_plan_tries_only_engines_over_which_vllm_divides_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four workers can't divide 14 attention heads."""
    half = Case("h100-8.yaml", "0.5B", ((128, 8, 1000),)).config(tmp_path, "rollout.tensor_parallel_size=4")
    plan(half, Target(8, "h100", None, None, None), MeanLengths(300.0, 500.0, 0.5))
    text = capsys.readouterr().out
    assert "does not fit: rollout.tensor_parallel_size=4 does not divide model.path=" in text
    assert "14 attention heads. Set it to one of 1, 2." in text
    assert "engines of 2" in text and "engines of 4" not in text and "engines of 8" not in text


def test_unsharded_learners_of_7b_are_refused_with_the_highest_peak(tmp_path: Path) -> None:
    config = EIGHT.config(tmp_path, "policy.zero_stage=1")
    with pytest.raises(CapacityError, match=r"has 74.5 GiB, and phase start 113.\d GiB .*zero_stage"):
        EIGHT.capacity(config)


FIGURES = {"start": 65.3, "sample": 65.5, "score": 42.3, "policy": 59.3, "critic": 56.0, "publish": 47.7}


def test_the_figures_of_docs_placement_are_those_of_the_plan(tmp_path: Path) -> None:
    found = EIGHT.capacity(EIGHT.config(tmp_path))
    (peak,) = (need.peak for need in found.nodes if not need.is_of_host)
    work = work_of(EIGHT.config(tmp_path), prompt_tokens=300.0, response_tokens=500.0, deviation=0.5)
    layout = layout_of(EIGHT.config(tmp_path), device_of("h100"), 8)
    (memory,) = memory_per_device(work, layout, dtype="bfloat16")
    assert {each.phase: round(each.total / GIB, 1) for each in memory.peaks} == FIGURES
    assert peak.phase == "sample" and round(peak.total / GIB, 1) == FIGURES["sample"]


def test_7b_on_two_gpus_fits_only_with_optimizers_on_the_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """15.2 GB of weights: the states of a learner are 18 bytes per parameter, 16 of them of its optimizer."""
    case = Case("h100-8.yaml", "7B", ((32, 2, 500),))
    small = ["rollout.gpu_memory_utilization=0.35", "rl.samples_per_prompt=1"]
    for section in ("reward_model", "policy", "critic", "reference"):
        small += [f"{section}.ranks=2", f"{section}.micro_batch_tokens=2048"]
    small += ["reward.replicas=2", "rollout.replicas=2", "reward.micro_batch_tokens=2048"]
    offload = [f"{section}.offload_optimizer=true" for section in ("reward_model", "policy", "critic")]
    with pytest.raises(CapacityError, match=r"has 74.5 GiB, and phase .* takes more.*offload_optimizer moves states"):
        case.capacity(case.config(tmp_path, *small))
    found = case.capacity(case.config(tmp_path, *small, *offload))
    (host,) = (need for need in found.nodes if need.kind == "memory")
    assert host.certain > 2 * 16 * 7.6e9, "policy's and critic's states"
    for overrides, words in (
        (small, "the config as it is does not fit"),
        ([*small, *offload], "the config as it is: "),
    ):
        config = case.config(tmp_path, *overrides)
        work = work_of(config, prompt_tokens=300.0, response_tokens=500.0, deviation=0.5)
        show_configured(config, work, Target(2, "h100", None, None, None))
        assert words in capsys.readouterr().out


def test_a_critic_of_7b_on_two_gpus_is_refused(tmp_path: Path) -> None:
    case = CASES[-1]
    with pytest.raises(CapacityError, match=r"phase whole step \d+.\d GiB \(critic"):
        case.capacity(case.config(tmp_path, "critic.ranks=2"))


def test_unknown_gpu_memory_is_told_and_can_be_given(tmp_path: Path) -> None:
    (warning,) = EIGHT.capacity(EIGHT.config(tmp_path), gpu_memory=None).warnings
    assert "placement.gpu_memory_gib" in warning
    assert EIGHT.capacity(EIGHT.config(tmp_path, "placement.gpu_memory_gib=75"), gpu_memory=None).warnings == []
    with pytest.raises(CapacityError, match="has 40.0 GiB"):
        EIGHT.capacity(EIGHT.config(tmp_path, "placement.gpu_memory_gib=40"), gpu_memory=None)


@pytest.mark.parametrize(
    ("resources", "size"),
    [
        ({"accelerator_type:H100": 1.0, "GPU": 8.0}, 80e9),
        ({"accelerator_type:A100-80G": 1.0}, 80e9),
        ({"accelerator_type:T4": 1.0}, None),
        ({"GPU": 8.0}, None),
    ],
)
def test_gpu_memory_follows_from_the_kind_that_ray_recognizes(resources: dict[str, float], size: float | None) -> None:
    assert gpu_memory_of(resources) == size
