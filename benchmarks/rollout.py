"""`python -m benchmarks.rollout [--engine vllm|hf] [--rounds N] [--compiled]`: sampling against bare vLLM.

Ours: the engine of the rollout actor, in a process with the actor's environment: a seed per request, log-probs, prompts
as tokens, a table as output. References, with the same prompts, temperature, end tokens and lengths:

    same engine            `LLM.generate` of the engine's LLM with the same seeds, without log-probs
    own process            an LLM with vLLM's defaults, in process, eager, with a jemalloc that keeps its pages, without
                           seeds; samples of a prompt share its prefix, rounds do not
    own process, seeds     the same with our seeds, so that response lengths are about equal to ours
    compiled               as `own process`, with torch.compile (with --compiled: its start takes a minute)

With `--engine hf` ours is HfEngine and the reference is the model's `generate`.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from time import perf_counter
from typing import Any

import torch

from actors.engines.contract import EngineContext
from actors.groups.cluster import environment
from actors.roles.rollout import ENGINES
from actors.text.conversations import load_chat
from benchmarks.harness import Figure, Pairs, measure_turns, ratio_figure
from benchmarks.table import report
from benchmarks.turns import Answer, Contender, parsed
from benchmarks.work import Work, available, load_work
from jobs.stages.settings import sampling_of
from orchestrator.config.sections import RolloutConfig
from orchestrator.prompts import sample_requests
from orchestrator.types import ShardRequest

TARGET = 0.95
KEPT_PAGES = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"
SAMPLES = {"quickstart": 64, "gsm8k": 32}
KV_CACHE_GIB = 1.0

Sample = Callable[[Work], int]


@dataclass(frozen=True)
class Rival:
    """A reference: its process, and its name there."""

    process: str
    how: str
    target: float | None = None


RIVALS = {
    "same engine": Rival("ours", "seeded"),
    "own process": Rival("bare", "bare", TARGET),
    "own process, seeds": Rival("bare", "seeded", TARGET),
    "compiled": Rival("compiled", "bare"),
}
HF_RIVALS = {"HF generate": Rival("ours", "bare")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm")
    parser.add_argument("--work", choices=available(), action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true")
    arguments = parsed(parser, _build)
    rivals = dict(RIVALS if arguments.engine == "vllm" else HF_RIVALS)
    if not arguments.compiled:
        rivals.pop("compiled", None)
    report(
        f"rollout-{arguments.engine}",
        measure(arguments.engine, rivals, arguments.work or available(), arguments.rounds),
    )


def measure(engine: str, rivals: Mapping[str, Rival], works: Sequence[str], rounds: int) -> list[Figure]:
    ours = environment(torch.get_num_threads(), on_gpu=torch.cuda.is_available())
    best = {**ours, "MALLOC_CONF": KEPT_PAGES} if "MALLOC_CONF" in ours else ours
    with ExitStack() as stack:
        processes = {
            kind: stack.enter_context(
                Contender("benchmarks.rollout", {"kind": kind, "engine": engine}, ours if kind == "ours" else best)
            )
            for kind in sorted({"ours", *(rival.process for rival in rivals.values())})
        }
        return [figure for work in works for figure in _measure_work(processes, rivals, work, rounds)]


def _measure_work(
    processes: Mapping[str, Contender], rivals: Mapping[str, Rival], work: str, rounds: int
) -> list[Figure]:
    def tokens_per_s(process: str, how: str) -> float:
        return float(processes[process].ask(work=work, how=how)["tokens_per_s"])

    turns = [partial(tokens_per_s, "ours", "ours")]
    turns += [partial(tokens_per_s, rival.process, rival.how) for rival in rivals.values()]
    for warm_up in turns:
        warm_up()
    ours, *others = measure_turns(turns, rounds=rounds)
    return [
        ratio_figure(
            f"rollout {work} ÷ {name}",
            Pairs(ours, measured),
            "tokens/s",
            target=rival.target,
            detail=f"{SAMPLES[work]} samples at once, response tokens",
        )
        for (name, rival), measured in zip(rivals.items(), others, strict=True)
    ]


def _build(options: Mapping[str, Any]) -> Callable[..., Answer]:
    works = {name: load_work(name) for name in available()}
    samplers = _samplers(options["kind"], options["engine"], list(works.values()))

    def answer(*, work: str, how: str) -> Answer:
        started = perf_counter()
        num_tokens = samplers[how](works[work])
        return {"tokens_per_s": num_tokens / (perf_counter() - started)}

    return answer


def _samplers(kind: str, engine: str, works: Sequence[Work]) -> Mapping[str, Sample]:
    longest = max(works, key=lambda work: work.config.model.max_length)
    if kind != "ours":
        return _bare(_vllm(longest, is_compiled=kind == "compiled"))
    model = longest.config.model.model_copy(update={"dtype": "bfloat16"})
    rollout = RolloutConfig(kv_cache_gib=KV_CACHE_GIB)
    threads = torch.get_num_threads()
    context = EngineContext(model=model, rollout=rollout, threads=threads, max_samples=max(SAMPLES.values()))
    module, _, name = ENGINES[engine].partition(":")
    make = getattr(importlib.import_module(module), name)
    if engine == "hf":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        ours = make(longest.folder, context, device=device)
        return {"ours": _ours(ours), "bare": _hf_generate(ours._model, ours._tokenizer)}
    ours = make(longest.folder, context)
    return {"ours": _ours(ours), **_bare(ours._llm)}


def _requests(work: Work) -> ShardRequest:
    repeats = -(-SAMPLES[work.name] // len(work.prompts))
    requests = sample_requests(work.prompts, samples_per_prompt=repeats, seed=1, step=0)
    return ShardRequest(0, 0, requests[: SAMPLES[work.name]], sampling_of(work.config))


def _ours(engine: Any) -> Sample:
    def sample(work: Work) -> int:
        _, numbers = engine.generate(_requests(work))
        return int(numbers["num_response_tokens"])

    return sample


def _bare(llm: Any) -> Mapping[str, Sample]:
    """`LLM.generate` without and with seeds; its inputs are built once."""
    vllm = importlib.import_module("vllm")

    @cache
    def inputs(work: Work, is_seeded: bool) -> tuple[list[Any], list[Any]]:
        request = _requests(work)
        ends = list(load_chat(work.folder).stops)
        parameters = [
            vllm.SamplingParams(
                temperature=request.sampling.temperature,
                max_tokens=request.sampling.max_new_tokens,
                stop_token_ids=ends,
                detokenize=False,
                seed=item.seed if is_seeded else None,
            )
            for item in request.requests
        ]
        return [
            vllm.TokensPrompt(prompt_token_ids=item.prompt.tokens.tolist()) for item in request.requests
        ], parameters

    def sample(work: Work, *, is_seeded: bool) -> int:
        llm.reset_prefix_cache()
        outputs = llm.generate(*inputs(work, is_seeded), use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return {"bare": partial(sample, is_seeded=False), "seeded": partial(sample, is_seeded=True)}


def _vllm(work: Work, *, is_compiled: bool) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    vllm = importlib.import_module("vllm")
    return vllm.LLM(
        model=str(work.folder),
        dtype=work.config.model.compute_dtype,
        max_model_len=work.config.model.max_length,
        max_num_seqs=max(SAMPLES.values()),
        enforce_eager=not is_compiled,
        kv_cache_memory_bytes=None if torch.cuda.is_available() else int(KV_CACHE_GIB * 2**30),
        generation_config="vllm",
        disable_log_stats=True,
    )


def _hf_generate(model: Any, tokenizer: Any) -> Sample:
    tokenizer.padding_side = "left"

    def sample(work: Work) -> int:
        request = _requests(work)
        batch = tokenizer.pad(
            {"input_ids": [item.prompt.tokens.tolist() for item in request.requests]}, return_tensors="pt"
        ).to(model.device)
        longest = request.sampling.max_new_tokens
        made = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=longest)[
            :, batch["input_ids"].shape[1] :
        ]
        ends = torch.isin(made, torch.tensor(load_chat(work.folder).stops, device=made.device))
        return int((ends.cumsum(1) - ends.int() == 0).sum())

    return sample


if __name__ == "__main__":
    main()
