"""ZeRO-3 with parameters that really lie in parts on two ranks: all that a learner computes, saves, exports and
publishes equals stage 0 on one rank. Tiny parameters would otherwise stay whole (zero.PERSISTENT_ELEMENTS)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from actors.learning import distributed, zero
from actors.learning.distributed import Group
from actors.learning.documents import can_pack
from actors.learning.heads import PolicyModel, ValueModel, probe
from actors.learning.learner import Learner, Update
from actors.learning.objectives.losses import LossTerms
from actors.learning.packing import MicroBatch, TokenRows
from actors.learning.sharing import can_share
from actors.models.model import load_causal, load_scorer
from actors.text.tokenizing import load_tokenizer
from actors.weights.manifest import pack, plan
from orchestrator.config.sections import LearnerConfig, LoraConfig
from orchestrator.errors import StorageError
from orchestrator.planning.balance import plan_minibatches
from tests.families import tiny_folder
from tests.numerics.ranks import group, run_ranks
from tests.numerics.samples import experience
from tests.tiny import tiny_llama, tiny_scorer

STAGES = (0, 1, 2, 3)
STEPS = 3
BUCKET_BYTES = 1 << 12


@dataclass(frozen=True)
class Case:
    """What learns, and how.

    Args:
        folder: makes the model.
        lines: how rows lie in the lines of a micro-batch.
    """

    folder: Callable[[Path], Path] = tiny_llama
    scores: bool = False
    lines: str = "rows"
    settings: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "policy, tied embeddings": Case(),
    "policy, untied, activations recomputed": Case(
        lambda place: tiny_llama(place, tied=False), settings={"gradient_checkpointing": True}
    ),
    "policy, clipped, weight decay": Case(settings={"max_grad_norm": 0.01, "weight_decay": 0.1}),
    "policy, packed rows": Case(lines="packed"),
    "policy, shared prompts": Case(lines="shared"),
    "policy, capped logits": Case(lambda place: tiny_folder("Gemma 2", place)),
    "policy, transposed weights": Case(lambda place: tiny_folder("GPT-2", place)),
    "policy, experts": Case(lambda place: tiny_folder("Mixtral", place)),
    "policy, LoRA": Case(settings={"lora": LoraConfig(rank=4)}),
    "policy, DoRA, activations recomputed": Case(
        settings={"lora": LoraConfig(rank=4, dora=True), "gradient_checkpointing": True}
    ),
    "critic": Case(tiny_scorer, scores=True),
    "critic, LoRA": Case(tiny_scorer, scores=True, settings={"lora": LoraConfig(rank=4)}),
    "reward model, three heads": Case(lambda place: tiny_scorer(place, heads=3), scores=True),
}


class RecordingLearner(Learner):
    """Records the full gradient of the last update before it is clipped."""

    gradient: Tensor

    def _apply(self, what: str) -> tuple[float, float]:
        learned = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        found = [safe_get_full_grad(parameter) if self._stage else parameter.grad for parameter in learned]
        shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in learned]
        self.gradient = torch.cat(
            [
                (torch.zeros(shape) if gradient is None else gradient.cpu()).flatten().double()
                for gradient, shape in zip(found, shapes, strict=True)
            ]
        )
        return super()._apply(what)


def policy_objective(output: tuple[Tensor, Tensor], micro: MicroBatch) -> LossTerms:
    logprobs_N, entropy_N = output
    loss = -(logprobs_N * micro.columns["advantages"]).sum() - 0.1 * entropy_N.sum()
    return LossTerms(loss, {"loss": loss.detach()})


def value_objective(output: tuple[Tensor, Tensor], micro: MicroBatch) -> LossTerms:
    values_NH = output[0].reshape(len(micro.targets_N), -1)
    weights_H = torch.arange(1, values_NH.shape[1] + 1, device=values_NH.device)
    loss = ((values_NH - micro.columns["returns"].unsqueeze(1)).square() * weights_H).sum()
    return LossTerms(loss, {"loss": loss.detach()})


def make(case: Case, folder: Path, stage: int) -> RecordingLearner:
    model: Any = (
        ValueModel(load_scorer(folder, torch.float32))
        if case.scores
        else PolicyModel(load_causal(folder, torch.float32), temperature=0.7, chunk=16)
    )
    if case.lines == "packed":
        assert can_pack(model.pretrained)
    if case.lines == "shared":
        assert can_share(model.pretrained)
    settings = {"learning_rate": 1e-3, "zero_stage": stage, **case.settings}
    return RecordingLearner(model, LearnerConfig(**settings), dtype="float32", total_optimizer_steps=8, seed=1)


def rows_of(case: Case, step: int) -> TokenRows:
    table = experience(seed=step)
    if case.lines == "shared":
        prompts = table["prompt_tokens"].take(pa.array([1, 1, 1, 1, 4, 4, 4, 4]))
        table = table.set_column(table.column_names.index("prompt_tokens"), "prompt_tokens", prompts)
    found = TokenRows.of_table(table, ("advantages", "returns"), shares_prompts=case.lines == "shared")
    found.is_packed = case.lines == "packed"
    return found


def learn(case: Case, learner: Learner, step: int) -> Update:
    rows = rows_of(case, step)
    (ranks,) = plan_minibatches(
        rows.lengths,
        num_minibatches=1,
        num_ranks=learner.world_size,
        micro_batch_tokens=60,
        seed=(1, step),
        is_packed=rows.is_packed,
    )
    micros = [rows.pack(micro, learner.device) for micro in ranks[learner.rank]]
    objective = value_objective if case.scores else policy_objective
    return learner.update(micros, objective, count=float(rows.response_lengths.sum()), what=f"step {step}")


def published(learner: Learner) -> tuple[list[tuple[str, str, tuple[int, ...]]], dict[str, str], bytes]:
    """(names, types and shapes; checksums by tensor; all bytes) as engines get them."""
    header = plan(learner.weight_specs(), BUCKET_BYTES)
    buckets = list(pack(header, learner.full_weights()))
    checksums = {name: told for bucket in buckets for name, told in bucket.digests.items()}
    specs = [(spec.name, spec.dtype, spec.shape) for spec in header.tensors]
    return specs, checksums, b"".join(bucket.data.tobytes() for bucket in buckets)


def share_kept(learner: Learner) -> float:
    """The largest share of a parameter that lies on this rank between uses; 1 without stage 3."""
    shares = []
    for parameter in learner._model.parameters():
        if hasattr(parameter, "ds_id"):
            whole = parameter.ds_status == ZeroParamStatus.AVAILABLE and parameter.ds_numel > 1
            shares.append(1.0 if whole else min(1.0, (parameter.ds_tensor.numel() - 1) / parameter.ds_numel))
        else:
            shares.append(1.0)
    return max(shares)


def measure(mine: Group, folders: Mapping[str, Path], place: Path, stages: tuple[int, ...]) -> dict[Any, Any]:
    zero.PERSISTENT_ELEMENTS = 0
    found = {}
    for name, folder in folders.items():
        case, tokenizer = CASES[name], load_tokenizer(folder)
        for stage in stages:
            here = place / f"{name} {stage}"
            here.mkdir(exist_ok=True)
            learner = make(case, folder, stage)
            facts: dict[str, Any] = {"published at the start": published(learner)}
            update = learn(case, learner, 0)
            facts |= {"gradient": learner.gradient, "loss": update.means["loss"], "norm": update.grad_norm}
            facts["share"] = share_kept(learner)
            learner.save(here / "saved")
            for step in range(1, STEPS):
                learn(case, learner, step)
            facts["output"] = learner.pass_through(probe(learner._model, learner.device))[0].cpu()
            facts["weights"] = dict(learner.full_weights())
            facts["published"] = published(learner)
            learner.export(here / "export", tokenizer)
            resumed = make(case, folder, stage)
            resumed.load(here / "saved")
            for step in range(1, STEPS):
                learn(case, resumed, step)
            facts["resumed"] = dict(resumed.full_weights())
            load = load_scorer if case.scores else load_causal
            facts["exported"] = load(here / "export", torch.float32).state_dict()
            found[name, stage] = facts | {"model": folder, "saved": here / "saved"}
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("partitioned")
    folders = {name: case.folder(place / f"model {name}") for name, case in CASES.items()}
    for world in ("one", "two"):
        (place / world).mkdir()
    distributed.join(group())
    two = run_ranks(measure, 2, folders, place / "two", STAGES)
    return {"one": measure(group(), folders, place / "one", (0,)), "two": two[0], "other": two[1]}


def closeness(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", CASES)
def test_parameters_lie_in_parts(measured: Any, name: str) -> None:
    assert measured["two"][name, 3]["share"] <= 0.5 < measured["two"][name, 2]["share"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_gradient_loss_norm_and_outputs_equal_those_of_one_rank(measured: Any, name: str, stage: int) -> None:
    found, plain = measured["two"][name, stage], measured["one"][name, 0]
    assert plain["gradient"].norm() > 1e-2
    assert closeness(found["gradient"], plain["gradient"]) < 1e-5
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5, abs=1e-6)
    assert found["norm"] == pytest.approx(plain["norm"], rel=1e-5)
    assert closeness(found["output"], plain["output"]) < 1e-4
    for tensor, weight in plain["weights"].items():
        assert closeness(found["weights"][tensor], weight) < 1e-3, tensor


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_what_engines_get_is_what_the_ranks_hold(measured: Any, name: str, stage: int) -> None:
    found, plain = measured["two"][name, stage], measured["one"][name, 0]
    assert found["published at the start"] == plain["published at the start"], "before learning all bits are equal"
    specs, checksums, _ = found["published"]
    assert specs == plain["published"][0] and list(checksums) == [name for name, _, _ in specs]
    assert found["published"] == measured["other"][name, stage]["published"]
    assert checksums == dict(_checksums(found["weights"]))


def _checksums(weights: Mapping[str, Tensor]) -> Mapping[str, str]:
    header = plan(((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()), BUCKET_BYTES)
    return {name: told for bucket in pack(header, weights.items()) for name, told in bucket.digests.items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_a_reload_continues_with_the_same_bits_and_an_export_holds_them(measured: Any, name: str, stage: int) -> None:
    found = measured["two"][name, stage]
    for tensor, weight in found["weights"].items():
        assert torch.equal(found["resumed"][tensor], weight), tensor
        assert torch.equal(found["exported"][tensor], weight), tensor


def test_a_checkpoint_of_two_ranks_is_refused_by_one(measured: Any) -> None:
    name = "policy, tied embeddings"
    facts = measured["two"][name, 3]
    with pytest.raises(StorageError, match=r"world_size=2 \(now 1\).*start a new run from the exported weights"):
        make(CASES[name], facts["model"], 3).load(facts["saved"])
