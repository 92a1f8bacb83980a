"""A rollout engine on transformers, for architectures that vLLM does not support. Slower, with the same contract.

Shape suffixes: B samples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import pyarrow as pa
import torch

from actors.engines.contract import (
    EngineContext,
    Sample,
    ServedVersion,
    UpdateReport,
    ordered_requests,
    rollout_table,
    summary,
)
from actors.machine.devices import compute_device
from actors.models.export import named_state
from actors.models.model import load_causal, torch_dtype
from actors.text.conversations import load_chat
from actors.weights.digest import digest
from actors.weights.manifest import TensorSpec, Unpacker, WeightHeader, check_names, listed
from actors.weights.transports.group import Rendezvous
from actors.weights.transports.receiver import Parcel, Receiver
from actors.weights.transports.shared import device_id
from orchestrator.errors import PublishError
from orchestrator.roles import Tag
from orchestrator.types import SampleRequest, Sampling, ShardRequest


class HfEngine:
    """Implements actors.engines.contract.Engine. Serves `context.version` when constructed."""

    def __init__(self, folder: Path, context: EngineContext, *, device: str | None = None) -> None:
        self._context, self._device = context, torch.device(device) if device else compute_device()
        dtype, remote = torch_dtype(context.model.compute_dtype), context.model.trust_remote_code
        self._chat = load_chat(folder, context.model, context.template)
        self._model = load_causal(folder, dtype, trust_remote_code=remote)
        self._model.to(self._device).requires_grad_(False)
        self._needed = [name for name, _ in named_state(self._model)]
        self._held: dict[str, torch.Tensor] = {}
        self._served = ServedVersion(context.version)
        self._unpacker: Unpacker | None = None
        self._receiver = Receiver(self._device, keeps=False)
        self._expected: dict[str, str] = {}  # digests by tensor
        self._seconds: dict[str, float] = {}
        if context.version is None:
            self.sleep(level=2)

    @torch.inference_mode()
    def generate(self, request: ShardRequest) -> tuple[pa.Table, dict[str, Any]]:
        version = self._served.require()
        requests = ordered_requests(request, self._context.model.max_length)
        started = perf_counter()
        torch.set_num_threads(self._context.threads)
        samples = self._sample(requests, request.sampling)
        table = rollout_table(requests, samples, chat=self._chat, version=version)
        return table, summary(table, version=version, seconds=perf_counter() - started)

    @torch.inference_mode()
    def prompt_logprobs(self, token_lists: Sequence[Sequence[int]]) -> list[list[float]]:
        self._served.require()
        return [self._logprobs_of(torch.tensor([list(tokens)], device=self._device)) for tokens in token_lists]

    def begin_update(self, header: WeightHeader) -> None:
        self._served.begin(header)
        with self._served.failing():
            self._held = self._model.state_dict()  # moving the model between devices replaces its buffers
            check_names((spec.name for spec in header.tensors), needed=self._needed, optional=self._held)
        self._unpacker, self._expected = Unpacker(header, proved_later=self._proves), {}
        self._receiver.begin(header)
        self._seconds = {"receive": 0.0, "apply": 0.0, "verify": 0.0}

    def device_ids(self) -> list[str]:
        return [device_id(self._device)]

    def join(self, meeting: Rendezvous, first_rank: int) -> None:
        self._receiver.join(meeting, first_rank)

    @torch.no_grad()
    def receive_bucket(self, parcel: Parcel) -> None:
        self._served.updating()
        assert self._unpacker is not None
        with self._served.failing():
            started = perf_counter()
            bucket = self._receiver.take(parcel)
            tensors = self._unpacker.add(bucket)
            received = perf_counter()
            for name, tensor in tensors:
                held = self._held[name]
                held.copy_(tensor)
                is_same = held.dtype == tensor.dtype
                self._expected[name] = bucket.digests[name] if is_same else digest(tensor.to(held.dtype), name).hex
        self._seconds["receive"] += received - started
        self._seconds["apply"] += perf_counter() - received

    def finish_update(self, version: int) -> UpdateReport:
        header = self._served.updating()
        assert self._unpacker is not None
        started = perf_counter()
        self._receiver.finish()
        compared = self._expected if self._reads_back else {}
        with self._served.failing():
            if not self._unpacker.done:
                raise PublishError("the update was finished before all of its buckets arrived; publish again.")
            stale = [name for name, sent in compared.items() if digest(self._held[name], name).hex != sent]
            if stale:
                raise PublishError(f"the engine does not hold the published weights of {listed(stale)}; publish again.")
        self._seconds["verify"] += perf_counter() - started
        self._served.serve(version)
        return UpdateReport(version, len(header.tensors), header.num_bytes, len(compared), self._seconds)

    @property
    def _reads_back(self) -> bool:
        return self._context.publish.verify != "checksums"

    def _proves(self, spec: TensorSpec) -> bool:
        """Whether `finish_update` compares what is held with the trainer's digest itself."""
        return self._reads_back and self._held[spec.name].dtype == spec.torch_dtype

    def version(self) -> int | None:
        return self._served.number

    def sleep(self, level: int) -> None:
        """Keeps the weights on the host at each level."""
        if self._context.sleeps:
            if level > 1:
                self._served.discard()
            self._model.to("cpu")
            torch.cuda.empty_cache()

    def wake(self, tags: Sequence[Tag]) -> None:
        if self._context.sleeps and "weights" in tags:
            self._model.to(self._device)

    def _logprobs_of(self, tokens: torch.Tensor) -> list[float]:
        logits = self._model(tokens).logits[0, :-1].float()
        chosen = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, 1:, None])
        values: list[float] = chosen[:, 0].tolist()
        return values

    def _sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """Samples all requests together, each with a separate generator, with left-padded prompts."""
        generators = [torch.Generator(self._device).manual_seed(item.seed) for item in requests]
        width = max(len(item.prompt.tokens) for item in requests)
        tokens = torch.zeros(len(requests), width, dtype=torch.long, device=self._device)
        mask = torch.zeros_like(tokens)
        for row, item in enumerate(requests):
            prompt = torch.from_numpy(item.prompt.tokens.astype("int64"))
            tokens[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt.to(self._device), 1
        ends = torch.tensor(self._chat.stops, device=self._device)
        positions, cache, chosen, chosen_logprobs = (mask.cumsum(1) - 1).clamp(min=0), None, [], []
        finished = torch.zeros(len(requests), dtype=torch.bool, device=self._device)
        for _ in range(sampling.max_new_tokens):
            output = self._model(
                tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            logprobs_BV = processed_logprobs(output.logits[:, -1].float(), sampling)
            tokens = torch.cat(
                [
                    row.argmax()[None] if item.is_greedy else torch.multinomial(row.exp(), 1, generator=generator)
                    for row, item, generator in zip(logprobs_BV, requests, generators, strict=True)
                ]
            )[:, None]
            chosen.append(tokens)
            chosen_logprobs.append(logprobs_BV.gather(1, tokens))
            finished |= torch.isin(tokens[:, 0], ends)
            if finished.all():
                break
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            positions = positions[:, -1:] + 1
        return _cut(
            torch.cat(chosen, dim=1).tolist(), torch.cat(chosen_logprobs, dim=1).tolist(), frozenset(self._chat.stops)
        )


def processed_logprobs(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probs at the sampling temperature, after top-k and then top-p (Holtzman 2019); -inf for excluded tokens."""
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[1]:
        kth_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if sampling.top_p < 1:
        ordered_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        before_BV = ordered_BV.softmax(dim=-1).cumsum(dim=-1) - ordered_BV.softmax(dim=-1)
        ordered_BV = ordered_BV.masked_fill(before_BV >= sampling.top_p, -torch.inf)
        logits_BV = torch.empty_like(logits_BV).scatter(1, order_BV, ordered_BV)
    return torch.log_softmax(logits_BV, dim=-1)


def _cut(tokens: list[list[int]], logprobs: list[list[float]], ends: frozenset[int]) -> list[Sample]:
    samples = []
    for row_tokens, row_logprobs in zip(tokens, logprobs, strict=True):
        length = next((i + 1 for i, token in enumerate(row_tokens) if token in ends), len(row_tokens))
        samples.append(Sample(row_tokens[:length], row_logprobs[:length]))
    return samples
