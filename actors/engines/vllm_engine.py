"""A rollout engine on vLLM, in process: the engine core runs in the actor that owns it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import pyarrow as pa
import torch
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt
from vllm.config import WeightTransferConfig
from vllm.platforms import current_platform

from actors.engines import vllm_plugin
from actors.engines.contract import (
    EngineContext,
    Sample,
    ServedVersion,
    UpdateReport,
    ordered_requests,
    rollout_table,
    summary,
)
from actors.engines.vllm_workers import Workers
from actors.machine.devices import require_usable
from actors.text.conversations import load_chat
from actors.weights.manifest import WeightHeader
from actors.weights.transports.group import Rendezvous
from actors.weights.transports.receiver import Parcel
from orchestrator.errors import ConfigError, RlhfError
from orchestrator.garbage import collect_seldom
from orchestrator.roles import Tag
from orchestrator.types import SampleRequest, Sampling, ShardRequest

_GIB = 1 << 30
_PARTS: tuple[Tag, ...] = ("weights", "kv_cache")
_CPU_BATCH_TOKENS = 4096  # vLLM's own default there
_VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Roles take turns on the cores; pinned threads of two roles on one core would starve each other.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # OpenMP's threads do not survive a fork: a forked worker would wait for them forever.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmEngine:
    """Implements actors.engines.contract.Engine. Serves `context.version` when constructed."""

    def __init__(self, folder: Path, context: EngineContext) -> None:
        _check(context)
        self._context = context
        self._chat = load_chat(folder, context.model, context.template)
        self._llm = start_llm(folder, context)
        self._workers = Workers(self._llm)
        self._served = ServedVersion(context.version)
        self._asleep: set[Tag] = set()
        if context.version is None:
            self.sleep(level=2)

    def generate(self, request: ShardRequest) -> tuple[pa.Table, dict[str, Any]]:
        version = self._served.require()
        requests = ordered_requests(request, self._context.model.max_length)
        self._forget_prefixes()
        started = perf_counter()
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=item.prompt.tokens.tolist()) for item in requests],
            [self._parameters(request.sampling, item) for item in requests],
            use_tqdm=False,
        )
        samples = [_sample(output) for output in outputs]
        table = rollout_table(requests, samples, chat=self._chat, version=version)
        return table, summary(table, version=version, seconds=perf_counter() - started)

    def prompt_logprobs(self, token_lists: Sequence[Sequence[int]]) -> list[list[float]]:
        self._served.require()
        parameters = SamplingParams(temperature=1.0, max_tokens=1, seed=0, prompt_logprobs=0, detokenize=False)
        prompts = [TokensPrompt(prompt_token_ids=list(tokens)) for tokens in token_lists]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [
            [entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]
            for tokens, output in zip(token_lists, outputs, strict=True)
        ]

    def begin_update(self, header: WeightHeader) -> None:
        self._served.begin(header)
        with self._served.failing():
            self._workers.begin(header, self._context.publish.verify, self._served.num_updates)

    def device_ids(self) -> list[str]:
        return self._workers.device_ids()

    def join(self, meeting: Rendezvous, first_rank: int) -> None:
        self._workers.join(meeting, first_rank)

    def receive_bucket(self, parcel: Parcel) -> None:
        self._served.updating()
        with self._served.failing():
            self._workers.receive(parcel)

    def finish_update(self, version: int) -> UpdateReport:
        header = self._served.updating()
        with self._served.failing():
            num_compared, seconds = self._workers.finish()
            return self._serve(version, header, num_compared, seconds)

    def version(self) -> int | None:
        return self._served.number

    def sleep(self, level: int) -> None:
        if not self._context.sleeps:
            return
        if level > 1:
            self._served.discard()
        if not set(_PARTS) <= self._asleep:
            self._llm.sleep(level=level)
            self._asleep = set(_PARTS)

    def wake(self, tags: Sequence[Tag]) -> None:
        # vLLM wakes nothing if one of several parts is awake.
        if sleeping := [tag for tag in _PARTS if tag in tags and tag in self._asleep]:
            self._llm.wake_up(sleeping)
            self._asleep -= set(sleeping)

    def _serve(self, version: int, header: WeightHeader, num_compared: int, seconds: dict[str, float]) -> UpdateReport:
        self._forget_prefixes()
        self._served.serve(version)
        return UpdateReport(version, len(header.tensors), header.num_bytes, num_compared, seconds)

    def _forget_prefixes(self) -> None:
        """Cached blocks must outlive neither the weights nor the memory that they were computed with, and hits on those
        of earlier shards would make batches, and so the last bits, depend on what an engine sampled before."""
        if self._context.rollout.prefix_caching and not self._llm.reset_prefix_cache():
            raise RlhfError("vLLM kept cached blocks of prompts, because some are still in use.")

    def _parameters(self, sampling: Sampling, item: SampleRequest) -> SamplingParams:
        return SamplingParams(
            temperature=0.0 if item.is_greedy else sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            seed=item.seed,
            stop_token_ids=list(self._chat.stops),
            logprobs=0,
            detokenize=False,
        )


def start_llm(folder: Path, context: EngineContext, *, skip_tokenizer_init: bool = False) -> LLM:
    model, rollout = context.model, context.rollout
    width = rollout.tensor_parallel_size
    require_usable()
    os.environ.update(_VLLM_ENVIRONMENT)
    vllm_plugin.register()
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        # vLLM fixes torch's thread count when it starts.
        torch.set_num_threads(context.threads)
        os.environ["OMP_NUM_THREADS"] = str(max(1, context.threads // width))  # of each worker, if they are processes
    collect_seldom()  # vLLM runs five full garbage collections when it starts
    return LLM(
        model=str(folder),
        dtype=model.compute_dtype,
        max_model_len=model.max_length,
        max_num_seqs=context.max_samples,
        seed=context.seed,
        tensor_parallel_size=width,
        # By default vLLM asks Ray for the workers of an engine in a placement group, which holds the GPUs already.
        distributed_executor_backend="mp" if width > 1 else None,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        # An explicit size also avoids the warm-up on CPUs.
        kv_cache_memory_bytes=int(rollout.kv_cache_gib * _GIB) if on_cpu else None,
        enforce_eager=on_cpu,
        # vLLM 0.32 undoes the token that it samples for a partial prompt by rewinding the request's generator, but
        # torch's CPU generators can't: "CPU Generator does not use offset". Remove this when that is fixed.
        enable_chunked_prefill=not on_cpu,
        max_num_batched_tokens=max(_CPU_BATCH_TOKENS, model.max_length) if on_cpu else None,
        enable_prefix_caching=rollout.prefix_caching,
        enable_sleep_mode=context.sleeps,
        trust_remote_code=model.trust_remote_code,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        weight_transfer_config=WeightTransferConfig(backend=vllm_plugin.BACKEND),
        disable_log_stats=True,
        skip_tokenizer_init=skip_tokenizer_init,
    )


def _check(context: EngineContext) -> None:
    if current_platform.is_cpu() and context.sleeps:
        raise ConfigError("engines on CPUs have no GPU memory to free; build them without sleeps.")


def _sample(output: RequestOutput) -> Sample:
    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length") or completion.logprobs is None:
        raise RlhfError(
            f"vLLM ended request {output.request_id} by {completion.finish_reason!r} instead of sampling it."
        )
    tokens = list(completion.token_ids)
    entries = zip(tokens, completion.logprobs, strict=True)
    return Sample(tokens, [entry[token].logprob for token, entry in entries])
