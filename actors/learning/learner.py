"""A model and its optimizer, sharded over the ranks of a process group by DeepSpeed ZeRO. All methods are collective:
all ranks call them in the same order."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actors.learning import distributed, precision
from actors.learning.distributed import deepspeed
from actors.learning.heads import PolicyModel, ValueModel, probe, probed
from actors.learning.objectives.losses import LossTerms
from actors.learning.packing import MicroBatch
from actors.learning.resting import Rest, pointers, tensors_within, weights_of
from actors.learning.saving import drop_frozen, full_disks, load_learned
from actors.learning.zero import engine_config, gather_for_heads, optimizer_of
from actors.models.adapter_files import FOLDER as ADAPTER
from actors.models.adapter_files import write_adapter
from actors.models.adapters import adapt, adapters_of, select, switched_off
from actors.models.export import export_model, named_state
from actors.models.liger import use_liger
from actors.models.proofs import require_steady
from actors.models.safe_loading import SafeCheckpointEngine
from orchestrator.config.base import Dtype
from orchestrator.config.sections import LearnerConfig, LoraConfig
from orchestrator.errors import NonFiniteError, StorageError
from orchestrator.planning.memory import effective_zero_stage
from orchestrator.run.storage import writing
from orchestrator.training.schedule import learning_rate

Loss = Callable[[Any, MicroBatch], LossTerms]

_HOST = torch.device("cpu")
_TAG = "deepspeed"
_SUMMARY = "learner.json"
_PART_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Update:
    """Metrics of one optimizer step. `means` are sums over all ranks, divided by the count."""

    means: Mapping[str, float]
    maxima: Mapping[str, float]
    grad_norm: float
    learning_rate: float


class Learner:
    """A sharded model with its optimizer.

    Master weights and Adam's moments are fp32. With bfloat16, gradients are accumulated in fp32 in stages 1 to 3. Stage
    0 accumulates in bf16, because DeepSpeed has no fp32 accumulation there.

    Args:
        model: PolicyModel or ValueModel; its `pretrained` is saved, exported and published.
        dtype: compute type.
        total_optimizer_steps: length of the learning-rate schedule, in optimizer steps of the whole run or training.
        seed: of new adapters (config.lora); the model's own weights are then frozen, and have no optimizer state.
        name: of the adapters. Learners of one process may share a trunk under different names, without ZeRO-3.

    Raises:
        DataError: the model can't learn, or can't have adapters.
        ConfigError: lora.targets names a layer that the model does not have.
    """

    def __init__(
        self,
        model: PolicyModel | ValueModel,
        config: LearnerConfig,
        *,
        dtype: Dtype,
        total_optimizer_steps: int,
        seed: int = 0,
        name: str = "default",
    ) -> None:
        self.config, self.dtype, self._total_optimizer_steps = config, dtype, total_optimizer_steps
        self.optimizer_steps = 0
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._stage = effective_zero_stage(
            config.zero_stage, dtype=dtype, ranks=self.world_size, offloads=config.offload_optimizer
        )
        self._model, self._pretrained = model, model.pretrained
        if config.lora.rank:
            adapt(model, config.lora, name=name, seed=seed, forward=partial(probed, model))
            model.register_state_dict_post_hook(drop_frozen)
        self._name, self._adapters = name, adapters_of(self._pretrained, name)
        if config.gradient_checkpointing:
            model.checkpoint_gradients()
        require_steady(model, partial(probed, model))
        if self._stage == 3:
            gather_for_heads(model)
        self._engine = distributed.initialize(
            model=model, optimizer=optimizer_of(model, config), config=engine_config(config, dtype, self._stage)
        )
        self._engine.checkpoint_engine = SafeCheckpointEngine(self._engine._config)
        if self._is_plain_optimizer and self.world_size == 1:
            self._engine.enable_backward_allreduce = False  # it copies gradients even if there is nothing to add
        if self._stage == 1 and dtype == "bfloat16" and not config.offload_optimizer:
            # This wrapper's step clears its fp32 gradients, and the engine then clears them a second time. Before each
            # backward it fills the bf16 gradients with zeros, which autograd then reads. Both cost a pass over memory.
            # Remove this when DeepSpeed's BF16_Optimizer skips cleared gradients and frees accumulated ones.
            wrapper = self._engine.optimizer
            wrapper.zero_grad = partial(wrapper.clear_lp_grads, set_to_none=True)
            wrapper.backward_prologue = wrapper.zero_grad
        if self._stage == 0 and dtype == "bfloat16":
            # This wrapper allocates Adam's state with a zero-gradient step, which the bias correction would count.
            self._engine.optimizer.optimizer.state.clear()
        self.device: torch.device = self._engine.device
        self._rest, self._has_weights = Rest(self.device), True
        if config.liger:
            use_liger(self._pretrained, self._probed)
        if self.device.type == "cuda":
            precision.compute_the_same_bits(self._probed)

    def _probed(self) -> Tensor:
        """The output on a few tokens. With ZeRO-3 all ranks compute it together."""
        found: tuple[Tensor, Tensor] = self.pass_through(probe(self._model, self.device))
        return found[0]

    def rest(self, *, keeps_weights: bool = False) -> None:
        """Gives back the device's memory until `resume`. All ranks rest between the same calls, but none waits.

        Args:
            keeps_weights: only what an update needs leaves: moments, master weights and gradients. The learner can
                still score, publish and export.
        """
        if self._stage == 3:
            self._engine.empty_partition_cache()
        weights = pointers(weights_of(self._model)) if keeps_weights else set()
        self._rest.leave(
            tensor for tensor in tensors_within(self._engine) if tensor.untyped_storage().data_ptr() not in weights
        )
        self._has_weights = self._has_weights and keeps_weights

    def resume(self) -> None:
        """Undoes `rest`, bit by bit. Nothing happens without a `rest`."""
        self._rest.come_back()
        self._has_weights = True

    def _require_states(self) -> None:
        assert not self._rest.num_bytes, "the learner rests; call resume first"

    def _take_turn(self) -> None:
        """Makes a shared trunk compute with this learner's adapters."""
        assert self._has_weights, "the learner rests without its weights; call resume first"
        if self._adapters and not next(iter(self._adapters.values())).is_on:
            select(self._model, self._name)

    def pass_through(self, micro: MicroBatch) -> Any:
        """The model's output without gradient. With ZeRO-3, all ranks must make the same number of calls."""
        self._take_turn()
        return self._forward(micro)

    def _forward(self, micro: MicroBatch) -> Any:
        self._engine.eval()
        with torch.no_grad():
            return self._engine(micro)

    def pass_through_trunk(self, micro: MicroBatch) -> Any:
        """The same without adapters: the output of the model before learning."""
        self._take_turn()
        with switched_off(self._adapters.values()):
            return self._forward(micro)

    def update(self, micros: Sequence[MicroBatch], objective: Loss, *, count: float, what: str) -> Update:
        """One optimizer step on this rank's micro-batches of a minibatch.

        Args:
            micros: at least one; all ranks have the same number.
            objective: (model output, micro-batch) -> sums over the micro-batch.
            count: divisor of the sums: tokens (or prompts) of the whole minibatch over all ranks.
            what: name of the minibatch in errors.

        Raises:
            NonFiniteError: a loss or the global gradient norm is NaN or infinite. Raised on all ranks before the
                update is applied; this learner can't be used afterwards.
        """
        self._require_states()
        self._take_turn()
        self._engine.train()
        sums: dict[str, float] = {}
        maxima: dict[str, float] = {}
        bad_rows: list[int] = []
        for index, micro in enumerate(micros):
            self._engine.set_gradient_accumulation_boundary(index == len(micros) - 1)
            terms = objective(self._engine(micro), micro)
            # DeepSpeed averages gradients over ranks; the factor world_size undoes it.
            loss = terms.loss * (micro.weight * self.world_size / count)
            if not torch.isfinite(loss):
                bad_rows.extend(micro.rows)
            self._engine.backward(loss, scale_wrt_gas=False)
            _collect(terms, micro.weight, sums, maxima)
        self._refuse_bad_rows(bad_rows, what)
        means = {name: total / count for name, total in distributed.reduce_sums(sums, self.device).items()}
        grad_norm, lr = self._apply(what)
        return Update(means, distributed.reduce_maxima(maxima, self.device), grad_norm, lr)

    def _apply(self, what: str) -> tuple[float, float]:
        config = self.config
        lr = learning_rate(
            self.optimizer_steps,
            peak=config.learning_rate,
            schedule=config.schedule,
            warmup_optimizer_steps=config.warmup_optimizer_steps,
            total_optimizer_steps=self._total_optimizer_steps,
        )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        plain_norm = self._clip() if self._is_plain_optimizer else None
        if plain_norm is None or math.isfinite(plain_norm):
            self._engine.step()
        applied = self._engine.was_step_applied() if plain_norm is None else math.isfinite(plain_norm)
        if not applied:
            raise NonFiniteError(
                f"{what}: the global gradient norm is NaN or infinite; the update was not applied. Inspect the "
                "step's samples in the experience log; lower the learning rate or max_grad_norm."
            )
        self.optimizer_steps += 1
        return float(plain_norm if plain_norm is not None else self._engine.get_global_grad_norm()), lr

    @property
    def _is_plain_optimizer(self) -> bool:
        """Whether DeepSpeed runs torch's optimizer directly, without a check for overflow (stage 0 in fp32)."""
        return self._stage == 0 and self.dtype == "float32"

    def _clip(self) -> float:
        """Clips gradients as ZeRO does, and gives unused parameters the zeros that it gives them. Returns the norm."""
        norms = []
        for group in self._engine.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            squares = torch.stack([_sum_of_squares(parameter.grad) for parameter in group["params"]])
            norms.append(squares.sum().float().sqrt())
        norm = torch.linalg.vector_norm(torch.stack(norms))
        excess = (norm + 1e-6) / self.config.max_grad_norm
        if excess > 1.0:
            for group in self._engine.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(1.0 / excess)
        return float(norm)

    def _refuse_bad_rows(self, bad_rows: list[int], what: str) -> None:
        found = distributed.reduce_sums({"bad": float(len(bad_rows))}, self.device)
        if not found["bad"]:
            return
        everyones: list[list[int]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(everyones, bad_rows)
        rows = sorted(row for part in everyones for row in part)
        raise NonFiniteError(
            f"{what}: the loss is NaN or infinite in the micro-batches of rows {rows[:16]}; no update was applied."
        )

    def save(self, folder: Path) -> None:
        """Writes weights, master weights, optimizer and step count to `folder`, one file set per rank.

        Raises:
            StorageError: full disk or missing permission.
        """
        self._require_states()
        self._take_turn()
        with writing(folder), full_disks(folder):
            self._engine.save_checkpoint(
                str(folder),
                tag=_TAG,
                client_state={"optimizer_steps": self.optimizer_steps},
                save_latest=False,
                exclude_frozen_parameters=bool(self._adapters),
            )
            if self.rank == 0:
                (folder / _SUMMARY).write_text(json.dumps(self._shape(), indent=1), encoding="utf-8")
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Restores a saved state exactly: the next updates are bit-identical to those of the saved learner.

        Raises:
            StorageError: the checkpoint is incomplete or comes from a learner of another shape.
        """
        try:
            saved = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{folder / _SUMMARY} can't be read ({error}): no complete learner checkpoint."
            ) from error
        off = {"lora": LoraConfig().describe()}
        saved, mine = off | saved, off | self._shape()
        wrong = [f"{key}={saved.get(key)} (now {mine[key]})" for key in mine if saved.get(key) != mine[key]]
        if wrong:
            raise StorageError(
                f"{folder} was saved with {', '.join(wrong)}. Optimizer shards fit only the saved shape: "
                "continue with that shape, or start a new run from the exported weights."
            )
        self._require_states()
        self._take_turn()
        loaded, client_state = self._engine.load_checkpoint(
            str(folder), tag=_TAG, custom_load_fn=load_learned if self._adapters else None
        )
        if loaded is None:
            raise StorageError(f"{folder / _TAG} contains no DeepSpeed checkpoint of rank {self.rank}.")
        self.optimizer_steps = int(client_state["optimizer_steps"])

    def _shape(self) -> dict[str, Any]:
        return {
            "world_size": self.world_size,
            "zero_stage": self._stage,
            "dtype": self.dtype,
            "architecture": type(self._pretrained).__name__,
            **({"lora": self.config.lora.describe()} if self._adapters else {}),
        }

    def full_weights(
        self,
        dtype: torch.dtype | None = None,
        *,
        device: torch.device = _HOST,
        is_kept: bool = True,
        lends: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) of the state under transformers' names: all parameters (tied ones once), merged with
        their adapters in fp32, and all saved buffers.

        With ZeRO-3 all ranks gather each tensor together, so all must exhaust the iterator.

        Args:
            dtype: of floating-point tensors; None: the model's compute type.
            device: of the tensors.
            is_kept: False on a rank that only takes part in gathering: its tensors are empty.
            lends: parameters that need no change are yielded themselves, to be read before the next update. Otherwise
                all tensors are copies.
        """
        self._take_turn()
        for name, tensor in named_state(self._pretrained):
            adapter = self._adapters.get(name)
            with self._gathered([tensor, *(adapter.parameters() if adapter else ())]):
                if is_kept:
                    wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
                    is_own = lends and adapter is None and not hasattr(tensor, "ds_id")
                    copy = (adapter.merged(tensor) if adapter else tensor.detach()).to(device, wanted, copy=not is_own)
                else:
                    copy = tensor.new_empty(0)
            yield name, copy
            del copy  # before the next tensor is gathered

    @property
    def is_partitioned(self) -> bool:
        """Whether each rank holds a part of every parameter (ZeRO-3)."""
        return self._stage == 3

    def weight_parts(self) -> Iterator[tuple[str, Tensor, tuple[int, ...], int]]:
        """(name, this rank's part, full shape, position of its first element) of the parameters that ZeRO-3 has
        partitioned and that `full_weights` returns unchanged. Gathers nothing; nothing is partitioned below stage 3."""
        parameters: Iterable[tuple[str, Any]] = named_state(self._pretrained)
        for name, tensor in parameters:
            if hasattr(tensor, "ds_id") and name not in self._adapters:
                size = tensor.ds_tensor.ds_numel
                start = min(self.rank * size, tensor.ds_numel)
                own = tensor.ds_tensor.detach().flatten()[: tensor.ds_numel - start]  # the rest is padding
                yield name, own, tuple(tensor.ds_shape), start

    def weight_specs(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, shape) of the tensors of `full_weights`, in its order, without gathering them."""
        for name, tensor in named_state(self._pretrained, values=False):
            # With ZeRO-3 a parameter is empty between uses; ds_shape is its full shape.
            yield name, tensor.dtype, tuple(getattr(tensor, "ds_shape", tensor.shape))

    def _gathered(self, tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[Any]:
        sharded = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
        if sharded:
            gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded)
            return gathered
        return contextlib.nullcontext()

    def _learned_weights(self) -> Mapping[str, Tensor]:
        """Copies of the tensors that learn, on rank 0's CPU, by their names in the model."""
        self._take_turn()
        found = {}
        for name, tensor in self._pretrained.named_parameters():
            if tensor.requires_grad:
                with self._gathered([tensor]):
                    if self.rank == 0:
                        found[name] = tensor.detach().to("cpu", copy=True)
        return found

    def export(self, folder: Path, tokenizer: Any) -> None:
        """Writes a Hugging Face folder: safetensors, config, generation config, tokenizer. Adapters are merged, and
        beside that also written alone, in peft's format.

        Raises:
            StorageError: see export_model; raised on all ranks.
        """
        expected = self._probed()
        state = dict(self.full_weights(is_kept=self.rank == 0))
        learned = self._learned_weights() if self._adapters else {}

        def write_alone(unfinished: Path) -> None:
            if learned:
                write_adapter(self._pretrained, self.config.lora, learned, unfinished / ADAPTER)

        self._on_rank_0(lambda: export_model(self._model, state, folder, tokenizer, expected, write_alone))

    def export_weights(
        self, weights: Callable[[torch.dtype], Mapping[str, Tensor]], folder: Path, tokenizer: Any
    ) -> None:
        """The same with other weights, which rank 0 holds, instead of those that learn.

        Args:
            weights: the model's compute type -> (name, tensor) of all that `full_weights` gives.

        Raises:
            StorageError: as `export`.
        """
        dtype = self._pretrained.dtype
        self._on_rank_0(lambda: export_model(self._model, weights(dtype), folder, tokenizer, None))

    def _on_rank_0(self, work: Callable[[], None]) -> None:
        """Raises a StorageError of rank 0 on all ranks."""
        problem: StorageError | None = None
        if self.rank == 0:
            try:
                work()
            except StorageError as error:
                problem = error
        problems: list[StorageError | None] = [None] * self.world_size
        dist.all_gather_object(problems, problem)
        if problems[0] is not None:
            raise problems[0]


def _sum_of_squares(gradient: Tensor) -> Tensor:
    """In fp64, as ZeRO, in parts that fit a cache: a norm of 135 million numbers takes a quarter of the time."""
    parts = (part.double() for part in gradient.flatten().split(_PART_ELEMENTS))
    return torch.stack([part.dot(part) for part in parts]).sum()


def _collect(terms: LossTerms, weight: float, sums: dict[str, float], maxima: dict[str, float]) -> None:
    for name, value in terms.sums.items():
        sums[name] = sums.get(name, 0.0) + (float(value) if weight else 0.0)
    for name, value in terms.maxima.items():
        maxima[name] = max(maxima.get(name, -math.inf), float(value) if weight else -math.inf)
