"""Parts of the engine tests that run in a separate process: vLLM changes its process (threads, environment, memory
policy, process groups), which must not affect other tests."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
import vllm.model_executor.layers.utils as vllm_layers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM
from vllm.distributed import destroy_model_parallel

import actors.weights.cpu
from actors.engines.contract import Engine, EngineContext, UpdateReport
from actors.engines.vllm_engine import VllmEngine
from actors.learning import distributed
from actors.learning.distributed import Group
from actors.learning.heads import PolicyModel
from actors.learning.learner import Learner
from actors.learning.packing import token_rows
from actors.models.export import named_state
from actors.models.model import load_causal
from actors.weights.cpu import BucketTransferEngine
from actors.weights.manifest import Bucket, pack, plan
from actors.weights.packed import PackedWeight, packed_weight
from actors.weights.places import Places
from actors.weights.readback import ignores_its_parameter
from actors.weights.write import Writer
from orchestrator.config.base import Section
from orchestrator.config.publishing import PublishConfig
from orchestrator.config.sections import LearnerConfig, LoraConfig, ModelConfig, RolloutConfig
from orchestrator.errors import RlhfError
from orchestrator.types import GREEDY, Prompt, SampleRequest, Sampling, ShardRequest
from tests.families import tiny_model
from tests.tiny import tiny_config, tiny_tokenizer

Weights = dict[str, torch.Tensor]
_ALIVE: list[VllmEngine] = []
TEXTS = [[(7 * i + 3 * j) % 300 + 20 for j in range(4 + 5 * i)] for i in range(6)]


def served_llama(folder: Path, *, tied: bool, dtype: torch.dtype) -> Path:
    """tests.tiny's Llama with head size 32, the smallest that vLLM's CPU attention supports."""
    tiny_tokenizer().save_pretrained(folder)
    config = tiny_config(tied)
    config.head_dim = 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(dtype)
    # Typical of chat models; sampling must use only its EOS.
    model.generation_config = GenerationConfig(eos_token_id=0, do_sample=True, top_k=2, top_p=0.5, temperature=0.1)
    model.save_pretrained(folder)
    return folder


def start(folder: Path, **changes: Any) -> VllmEngine:
    """An engine that lives as long as its process: ending one engine destroys the process groups of the others."""
    engine = VllmEngine(folder, context(**changes))
    _ALIVE.append(engine)
    return engine


def context(**changes: Any) -> EngineContext:
    """The context of a small model's engine; `changes` are keys of the sections or fields of the context."""
    keys = {"dtype": "float32", "max_length": 128, "kv_cache_gib": 1 / 64, "threads": 2, "max_samples": 32, **changes}

    def section(kind: type[Section]) -> Any:
        return kind.model_validate({key: keys.pop(key) for key in kind.model_fields if key in keys})

    model, rollout, publishing = section(ModelConfig), section(RolloutConfig), section(PublishConfig)
    return EngineContext(model=model, rollout=rollout, publish=publishing, **keys)


def shard(*, sampling: Sampling, num_samples: int = 12) -> ShardRequest:
    requests = [
        SampleRequest(
            i, Prompt(f"p{i // 2}", f"text {i // 2}", np.array(TEXTS[i % 6], np.int32), {"answer": i}), i % 2, 50 + i
        )
        for i in range(num_samples)
    ]
    return ShardRequest(step=3, index=0, requests=requests, sampling=sampling)


def read_weights(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def saved_beside(folder: Path, weights: Weights, target: Path) -> Path:
    """A copy of the model folder with other weights."""
    shutil.copytree(folder, target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def perturbed(weights: Weights, names: Sequence[str], seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    changed = dict(weights)
    for name in names:
        noise = torch.randn(weights[name].shape, generator=generator)
        changed[name] = (weights[name].float() * (1 + 0.3 * noise) + 0.02 * noise).to(weights[name].dtype)
    return changed


def publish(
    engine: Engine, weights: Weights, version: int, *, alter: Callable[[Bucket], Bucket] = lambda bucket: bucket
) -> UpdateReport:
    header = plan(((name, t.dtype, t.shape) for name, t in weights.items()), bucket_bytes=64 * 1024)
    engine.begin_update(header)
    for bucket in pack(header, weights.items()):
        engine.receive_bucket(alter(bucket))
    return engine.finish_update(version)


def behaviour(engine: Engine) -> tuple[list[float], list[list[int]]]:
    """Log-probs of fixed texts, and greedy continuations."""
    logprobs = [value for row in engine.prompt_logprobs(TEXTS) for value in row]
    table, _ = engine.generate(shard(sampling=Sampling(top_k=1, max_new_tokens=16)))
    return logprobs, table.column("response_tokens").to_pylist()


def agreement_with_fresh_engines(folder: Path, dtype: str) -> list[tuple[str, float, bool, bool]]:
    """Publishes many kinds of changes to one engine; compares it each time with an engine started from the result.

    Returns:
        For each publish: what changed, the largest log-prob difference, whether greedy tokens agree, and whether the
        change had a visible effect.
    """
    engine = start(folder, dtype=dtype)
    weights = read_weights(folder)
    rounds = [(f"all, round {i}", list(weights)) for i in range(2)] + [(name, [name]) for name in _one_of_each(weights)]
    results, before = [], behaviour(engine)
    for version, (what, names) in enumerate(rounds, start=1):
        weights = perturbed(weights, names, seed=version)
        report = publish(engine, weights, version)
        assert (report.version, engine.version(), report.num_compared) == (version, version, len(weights))
        fresh_folder = saved_beside(folder, weights, folder.parent / f"{folder.name}-{dtype}-{version}")
        logprobs, tokens = behaviour(engine)
        fresh_logprobs, fresh_tokens = behaviour(start(fresh_folder, dtype=dtype))
        difference = max(abs(a - b) for a, b in zip(logprobs, fresh_logprobs, strict=True))
        results.append((what, difference, tokens == fresh_tokens, logprobs != before[0]))
        before = (logprobs, tokens)
    return results


def _one_of_each(weights: Weights) -> list[str]:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "input_layernorm")
    outside = [name for name in weights if ".layers." not in name]
    return [next(name for name in weights if kind in name and ".layers.1." in name) for kind in kinds] + outside


def failure(action: Callable[[], object]) -> str | None:
    """The message of the action's RlhfError; None if it succeeds."""
    try:
        action()
    except RlhfError as error:
        return f"{type(error).__name__}: {error}"
    return None


@contextmanager
def tied_layers_left_stale() -> Iterator[None]:
    with mock.patch.object(actors.weights.cpu, "refresh_tied_layers", return_value=None):
        yield


@contextmanager
def layer_keeps_its_packed_weights(engine: VllmEngine, name: str) -> Iterator[None]:
    """One layer gets no new packed copy, so it computes with its old weights."""
    model = _model(engine)
    (place,) = _places(engine)[name]
    module = dict(model.named_modules())[place.module]
    process = type(module.quant_method).process_weights_after_loading

    def process_but_one(method: Any, layer: torch.nn.Module) -> None:
        before = layer.cpu_linear
        process(method, layer)
        if layer is module:
            layer.cpu_linear = before

    kept, write = packed_weight(module), PackedWeight.write

    def write_but_one(packed: PackedWeight, first: int, rows: torch.Tensor) -> None:
        if packed is not kept:
            write(packed, first, rows)

    method = type(module.quant_method)
    with mock.patch.object(method, "process_weights_after_loading", process_but_one):
        with mock.patch.object(PackedWeight, "write", write_but_one):
            yield


@contextmanager
def packed_copies_everywhere() -> Iterator[None]:
    """Gives layers a packed copy where this CPU has no packed format for the dtype (bf16 without AMX), as vLLM does on
    others: only a copy can be stale. Layers that vLLM packs itself do not change."""
    dispatch = vllm_layers.dispatch_cpu_unquantized_gemm

    def pack_always(layer: torch.nn.Module, remove_weight: bool) -> None:
        dispatch(layer, remove_weight)
        if layer.weight.is_meta or layer.weight.ndim != 2 or ignores_its_parameter(layer, layer.weight.dtype):
            return
        copy = layer.weight.detach().clone()
        layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, copy, bias)
        if remove_weight:
            layer.weight = torch.nn.Parameter(torch.empty(0, dtype=copy.dtype), requires_grad=False)

    with mock.patch.object(vllm_layers, "dispatch_cpu_unquantized_gemm", pack_always):
        yield


def flip_one_bit(name: str, weights: Weights) -> Callable[[Bucket], Bucket]:
    header = plan(((key, t.dtype, t.shape) for key, t in weights.items()), bucket_bytes=64 * 1024)
    position = header.start(list(weights).index(name)) + weights[name].nbytes // 2

    def alter(bucket: Bucket) -> Bucket:
        if bucket.index != position // header.bucket_bytes:
            return bucket
        data = bucket.data.copy()
        data[position % header.bucket_bytes] ^= np.uint8(1)
        return dataclasses.replace(bucket, data=data)

    return alter


FAULTS = ("stale-tied-head", "never-applied", "not-packed", "bit-flip", "tensor-missing", "broken-off", "trainer-gone")


_HEALED: dict[tuple[str, str], VllmEngine] = {}  # by dtype and verify: names of engines that equal fresh ones
_FRESH: dict[str, Any] = {}  # by dtype: behaviour of a fresh engine with the correct weights


def publishing_fails_and_heals(folder: Path, dtype: str, fault: str, name: str, verify: str) -> dict[str, Any]:
    """One faulty publish, then a correct one; returns observations. A recovered engine serves the next fault too."""
    with packed_copies_everywhere():
        engine = _HEALED.pop((dtype, verify), None) or start(folder, dtype=dtype, verify=verify)
        seen = _publishing_fails_and_heals(engine, folder, dtype, fault, name)
    if seen["healed"]:
        _HEALED[dtype, verify] = engine
    return seen


def _publishing_fails_and_heals(engine: VllmEngine, folder: Path, dtype: str, fault: str, name: str) -> dict[str, Any]:
    weights = read_weights(folder)
    bad = perturbed(weights, list(weights), seed=1)
    seen = {"error": failure(lambda: _faulty_publish(engine, bad, fault, name)), "version": engine.version()}
    seen["refusal"] = failure(lambda: engine.generate(shard(sampling=Sampling())))
    good = perturbed(weights, list(weights), seed=2)
    publish(engine, good, 7)
    if dtype not in _FRESH:
        _FRESH[dtype] = behaviour(start(saved_beside(folder, good, folder.parent / "healed"), dtype=dtype))
    seen["healed"] = behaviour(engine) == _FRESH[dtype]
    return seen


def _faulty_publish(engine: VllmEngine, weights: Weights, fault: str, name: str) -> None:
    if fault == "stale-tied-head":
        with tied_layers_left_stale():
            publish(engine, weights, 1)
    elif fault == "never-applied":
        with altered_while_loading(engine, partial(_only, name, lambda _: None)):
            publish(engine, weights, 1)
    elif fault == "not-packed":
        with layer_keeps_its_packed_weights(engine, name):
            publish(engine, weights, 1)
    elif fault == "bit-flip":
        publish(engine, weights, 1, alter=flip_one_bit(name, weights))
    elif fault == "tensor-missing":
        publish(engine, {key: tensor for key, tensor in weights.items() if key != name}, 1)
    else:
        header = plan(((key, t.dtype, t.shape) for key, t in weights.items()), bucket_bytes=64 * 1024)
        engine.begin_update(header)
        engine.receive_bucket(next(iter(pack(header, weights.items()))))
        if fault == "broken-off":
            engine.finish_update(1)


def adapters_published(folder: Path, bits: int | None) -> dict[str, Any]:
    """Publishes policies with adapters to one engine, the last two with a fault in a weight that an adapter changes.

    Returns:
        "difference": largest difference between the engine's log-probs of TEXTS and the learner's, by kind of adapter;
        "changed": how much the adapters change them; and the errors of the faulty publishes.
    """
    distributed.join(Group(threads=2))
    engine = start(folder, verify="full")
    seen: dict[str, Any] = {"difference": {}, "changed": {}}
    before, _ = behaviour(engine)
    for version, more in enumerate(({}, {"dora": True}, {"rank_stabilised": True}), start=1):
        learner = _with_adapters(folder, LoraConfig(rank=4, alpha=8.0, trunk_bits=bits, **more), seed=version)
        publish(engine, dict(learner.full_weights()), version)
        found, _ = behaviour(engine)
        kind = next(iter(more), "lora")
        pairs = zip(found, _logprobs(learner), strict=True)
        seen["difference"][kind] = max(abs(one - other) for one, other in pairs)
        seen["changed"][kind] = max(abs(one - other) for one, other in zip(found, before, strict=True))
    weights = dict(_with_adapters(folder, LoraConfig(rank=4, trunk_bits=bits), seed=9).full_weights())
    name = "model.layers.1.self_attn.k_proj.weight"
    seen["bit-flip"] = failure(lambda: publish(engine, weights, 8, alter=flip_one_bit(name, weights)))
    with altered_while_loading(engine, partial(_only, name, lambda _: None)):
        seen["never-applied"] = failure(lambda: publish(engine, weights, 9))
    return seen


def _with_adapters(folder: Path, config: LoraConfig, *, seed: int) -> Learner:
    """A learner whose adapters change something."""
    model = PolicyModel(load_causal(folder, torch.float32), temperature=1.0)
    settings = LearnerConfig(zero_stage=0, lora=config)
    learner = Learner(model, settings, dtype="float32", total_optimizer_steps=1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return learner


def _logprobs(learner: Learner) -> list[float]:
    """Of TEXTS, from their second token on."""
    rows = token_rows([text[:1] for text in TEXTS], [text[1:] for text in TEXTS])
    values: list[float] = learner.pass_through(rows.pack(range(len(TEXTS)), torch.device("cpu")))[0].tolist()
    return values


Alter = Callable[[str, torch.Tensor], torch.Tensor | None]


@contextmanager
def altered_while_loading(engine: VllmEngine, alter: Alter) -> Iterator[None]:
    """The engine receives all tensors but writes or loads replacements for some; None: omits them."""
    model = _model(engine)
    load, write = model.load_weights, Writer.write

    def load_altered(weights: Any) -> Any:
        altered = ((name, alter(name, tensor)) for name, tensor in weights)
        return load((name, tensor) for name, tensor in altered if tensor is not None)

    def write_altered(writer: Writer, name: str, tensor: torch.Tensor) -> None:
        altered = alter(name, tensor)
        if altered is not None:
            write(writer, name, altered)

    with (
        mock.patch.object(model, "load_weights", load_altered),
        mock.patch.object(Writer, "write", write_altered),
        # A tensor in several buckets would otherwise be in its place before it is written.
        mock.patch.object(Writer, "room", return_value=None),
    ):
        yield


def every_fault_is_seen(folder: Path, dtype: str) -> tuple[dict[str, list[str]], str | None]:
    """Publishes to an engine once per tensor of its checkpoint and fault: the tensor is omitted, or one of its
    elements is changed. Publishes correctly in between.

    Args:
        folder: a model, with two more states of it in the files of `write_states`.

    Returns:
        By fault: tensors whose faulty publish was accepted. "well": correct publishes that were rejected. And why the
        engine can't write to the places of tensors alone.
    """
    state, newer = (load_file(folder / f"state-{number}") for number in range(2))
    destroy_model_parallel()
    engine = start(folder, dtype=dtype)
    names: list[str] = []
    with altered_while_loading(engine, lambda key, tensor: names.append(key) or tensor):
        report = publish(engine, newer, 1)
    missed: dict[str, list[str]] = {"left out": [], "one element": [], "well": []}
    if report.num_compared != len(state):
        missed["well"].append("not every tensor was compared")
    for faulty in names:
        for what, alter in FAULTS_OF_ONE.items():
            with altered_while_loading(engine, partial(_only, faulty, alter)), memory_without_older_weights():
                if failure(partial(publish, engine, state, 2)) is None:
                    missed[what].append(faulty)
            if failure(partial(publish, engine, newer, 3)) is not None:
                missed["well"].append(faulty)
    if "experts" in " ".join(state):
        with mock.patch.object(actors.weights.cpu, "pack_again"):
            missed["packed once"] = [] if failure(partial(publish, engine, state, 4)) else ["experts"]
    return missed, _transfer(engine).obstacle


@contextmanager
def memory_without_older_weights() -> Iterator[None]:
    """Fills new tensors with NaN; otherwise a layer that is not loaded could get freed memory with its weights."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _only(faulty: str, alter: Callable[[torch.Tensor], torch.Tensor | None], name: str, tensor: torch.Tensor) -> Any:
    return alter(tensor) if name == faulty else tensor


def _one_element(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] += 1
    return changed


FAULTS_OF_ONE: Mapping[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "left out": lambda tensor: None,
    "one element": _one_element,
}


def write_states(name: str, folder: Path, dtype: torch.dtype) -> None:
    """Two states of a model of tests.families. Runs without vLLM, which changes classes of transformers."""
    for number in range(2):
        model = tiny_model(name, seed=number + 1).to(dtype)
        save_file({key: tensor.detach().clone() for key, tensor in named_state(model)}, folder / f"state-{number}")


def _worker(engine: VllmEngine) -> Any:
    return engine._llm.llm_engine.model_executor.driver_worker.worker


def _model(engine: VllmEngine) -> torch.nn.Module:
    model: torch.nn.Module = _worker(engine).get_model()
    return model


def _transfer(engine: VllmEngine) -> BucketTransferEngine:
    transfer: BucketTransferEngine = _worker(engine).weight_transfer_engine
    return transfer


def _places(engine: VllmEngine) -> Places:
    return _transfer(engine)._places


def reference_logprobs(folder: Path, rows: Sequence[Mapping[str, Any]], temperature: float) -> list[list[float]]:
    """Log-probs of each row's response tokens at `temperature`, from transformers in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    results = []
    for row in rows:
        tokens = torch.tensor(row["prompt_tokens"] + row["response_tokens"])
        with torch.inference_mode():
            logits = model(tokens[None]).logits[0]
        start = len(row["prompt_tokens"])
        logprobs = torch.log_softmax(logits[start - 1 : -1] / temperature, dim=-1)
        results.append(logprobs.gather(1, tokens[start:, None])[:, 0].tolist())
    return results


def with_greedy(request: ShardRequest) -> ShardRequest:
    """The same requests, every third of them greedy."""
    requests = [
        dataclasses.replace(item, sample_index=GREEDY) if number % 3 == 2 else item
        for number, item in enumerate(request.requests)
    ]
    return dataclasses.replace(request, requests=requests)


def is_likeliest(folder: Path, row: Mapping[str, Any]) -> list[bool]:
    """Of each response token: whether no other token is likelier, but for rounding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = [*row["prompt_tokens"], *row["response_tokens"]]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, len(row["prompt_tokens"]) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(row["response_tokens"])[:, None])[:, 0]
    found: list[bool] = (chosen > logits.max(1).values - 1e-3).tolist()
    return found


def samples_of_one_engine(
    folder: Path, requests: Sequence[ShardRequest], **changes: Any
) -> list[tuple[pa.Table, dict[str, Any]]]:
    engine = start(folder, **changes)
    return [engine.generate(request) for request in requests]


_SHARED: dict[Path, VllmEngine] = {}


def behaviour_after(folder: Path, published: Path) -> tuple[list[float], list[list[int]]]:
    """Of an engine of one worker that started from `folder` and got the weights of another."""
    if folder not in _SHARED:
        _SHARED[folder] = start(folder)
    publish(_SHARED[folder], read_weights(published), 1)
    return behaviour(_SHARED[folder])


def samples_of_a_used_engine(folder: Path, request: ShardRequest) -> tuple[pa.Table, dict[str, Any]]:
    """For tests that do not depend on what the engine sampled before."""
    if folder not in _SHARED:
        _SHARED[folder] = start(folder)
    return _SHARED[folder].generate(request)


def refusals(folder: Path) -> dict[str, str | None]:
    """Answers of engines to impossible requests."""
    unpublished = start(folder, version=None)
    serving = start(folder)
    overlong = shard(sampling=Sampling(max_new_tokens=120))
    seen = {
        "unpublished": failure(lambda: unpublished.generate(shard(sampling=Sampling()))),
        "overlong": failure(lambda: serving.generate(overlong)),
        "no update": failure(lambda: serving.finish_update(1)),
    }
    publish(unpublished, read_weights(folder), 5)
    table, _ = unpublished.generate(shard(sampling=Sampling(max_new_tokens=4)))
    seen["versions"] = str(set(table.column("version").to_pylist()))
    return seen


def processor_seconds_after_sampling(folder: Path) -> float:
    """CPU time of the whole process in the second after a shard was sampled."""
    engine = start(folder)
    engine.generate(shard(sampling=Sampling(max_new_tokens=16)))
    before = time.process_time()
    time.sleep(1.0)
    return time.process_time() - before


def prefixes_shared(
    folder: Path, requests: Sequence[ShardRequest], published: Path, *, prefix_caching: bool, dtype: str
) -> tuple[list[pa.Table], list[int]]:
    """(samples, prompt tokens taken from the cache) of each request, and of the last again with other weights."""
    engine = start(folder, prefix_caching=prefix_caching, dtype=dtype, max_length=512, kv_cache_gib=1 / 8)
    generate, cached = engine._llm.generate, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        outputs = generate(*args, **kwargs)
        cached.append(sum(output.num_cached_tokens or 0 for output in outputs))
        return outputs

    engine._llm.generate = counting  # type: ignore[method-assign]
    tables = [engine.generate(request)[0] for request in requests]
    publish(engine, read_weights(published), 1)
    return [*tables, engine.generate(requests[-1])[0]], cached
