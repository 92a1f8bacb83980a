"""Tests whether vLLM supports a policy's architecture correctly, without its weights.

`python -m actors.engines.vllm_trial FOLDER` makes a small random model of the folder's config and starts an engine on
it. Its log-probs must equal those of transformers: for prompts, for tokens that it samples, and again after other
random weights were published. Prints one JSON object, a Verdict. It needs a separate process, because vLLM changes its
process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging
from vllm import SamplingParams, TokensPrompt
from vllm.distributed import destroy_model_parallel
from vllm.model_executor.models import registry

from actors.engines.contract import EngineContext, ServedVersion
from actors.engines.vllm_engine import VllmEngine, start_llm
from actors.engines.vllm_workers import Workers
from actors.models.export import named_state
from actors.weights.manifest import pack, plan
from orchestrator.config.base import Dtype
from orchestrator.config.sections import ModelConfig, RolloutConfig
from orchestrator.errors import PublishError

TOLERANCE = 5e-3  # nats, in fp32; vLLM's approximations of tanh and GELU differ by up to 6e-4
LONGEST = 64
_SMALL: Mapping[str, int] = {
    "num_hidden_layers": 8,  # a period of most patterns of layers
    "vocab_size": 512,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "sliding_window": 16,
    "num_experts": 32,
    "num_local_experts": 32,
    "n_routed_experts": 32,
}
_SMALL_HIDDEN = 512


@dataclass(frozen=True)
class Verdict:
    """`refusal`: why vLLM can't serve it; None if it can. `difference`: largest log-prob difference, in fp32.
    `untried`: why the trial was not possible."""

    refusal: str | None = None
    difference: float | None = None
    untried: str | None = None


def trial(folder: Path, *, dtype: Dtype, max_length: int, trust_remote_code: bool = False) -> Verdict:
    """Tries an engine on a small random model of the folder's architecture.

    Args:
        dtype: type of the engine's weights. Log-probs are compared in fp32; a publish is also verified in this type.
        max_length: longest sequence of the run; a sliding window that is at least as long is not tried.
    """
    # vLLM would inspect a model's class in another process, which takes 10 s.
    registry._run_in_subprocess = lambda look: look()
    with tempfile.TemporaryDirectory(prefix="rlhf-trial-") as scratch:
        try:
            small = _SmallModel(folder, Path(scratch), max_length, trust_remote_code)
        # Building a small model of an arbitrary config may fail anywhere.
        except Exception as error:  # noqa: BLE001
            return Verdict(untried=_one_line(error))
        try:
            difference = _difference(small, "float32")
            if dtype != "float32":
                _difference(small, dtype)
        except PublishError as error:
            return Verdict(str(error))
        # vLLM raises arbitrary classes for models that it does not support.
        except Exception as error:  # noqa: BLE001
            return Verdict(_one_line(error))
    if difference > TOLERANCE:
        return Verdict(f"its log-probs differ from those of transformers by {difference:.2g} nats", difference)
    return Verdict(None, difference)


class _SmallModel:
    """Two sets of random weights of one small model, transformers' outputs with each, and a folder with the first."""

    def __init__(self, folder: Path, scratch: Path, max_length: int, trust_remote_code: bool) -> None:
        self.folder, self.trust_remote_code = scratch, trust_remote_code
        config = shrunk(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), max_length)
        longest = min(LONGEST, getattr(config, "max_position_embeddings", None) or LONGEST)
        generator = torch.Generator().manual_seed(0)
        lengths = (5, longest // 3, longest)
        vocabulary = config.get_text_config().vocab_size
        self.texts = [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths]
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        randomise(model.eval(), seed=0)
        model.save_pretrained(scratch)
        for code in folder.glob("*.py"):
            (scratch / code.name).write_bytes(code.read_bytes())
        self.logprobs = self._logprobs(model)
        randomise(model, seed=1)
        self.new_logprobs = self._logprobs(model)
        self.new_state = {name: tensor.detach().clone() for name, tensor in named_state(model)}

    @torch.inference_mode()
    def _logprobs(self, model: Any) -> torch.Tensor:
        return torch.cat([_chosen(model(torch.tensor([text])).logits[0], text) for text in self.texts])


def _chosen(logits: torch.Tensor, text: list[int]) -> torch.Tensor:
    return logits[:-1].float().log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]


def randomise(model: Any, *, seed: int) -> None:
    """Adds noise to all parameters and saved buffers: a bias of zero or a norm of one would hide that it is not
    used."""
    generator = torch.Generator().manual_seed(seed)
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in named_state(model):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                is_constant = name in buffers and bool(tensor.any())  # of an activation, such as an epsilon
                tensor.mul_(1 + 0.1 * noise).add_(noise, alpha=0.0 if is_constant else 0.1)


def shrunk(config: PreTrainedConfig, max_length: int) -> PreTrainedConfig:
    """A config of the same architecture with a few layers, heads, experts and tokens, and heads of the same size.
    Sequences exceed a sliding window if those of `max_length` do."""
    values, names = config.to_dict(), config.attribute_map
    small = {name: most for name, most in _SMALL.items() if _is_larger(getattr(config, name, None), most)}
    if _is_larger(getattr(config, "sliding_window", None), max_length - 1):
        small["sliding_window"] = 2 * LONGEST
    heads = getattr(config, "num_attention_heads", None)
    if heads and config.hidden_size > _SMALL_HIDDEN:
        groups = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        small["num_attention_heads"] = 2 if groups in (1, heads) else 4
        small["num_key_value_heads"] = min(groups, 2)
        small["hidden_size"] = small["num_attention_heads"] * width if config.hidden_size == heads * width else 256
    layers, fewer = config.num_hidden_layers, small.get("num_hidden_layers")
    for key, value in values.items():
        if fewer and isinstance(value, list) and len(value) == layers:
            values[key] = value[:fewer]
        if key.endswith("_token_id") and _is_larger(_last(value), small.get("vocab_size", config.vocab_size) - 1):
            values[key] = 0
    values |= {names.get(name, name): value for name, value in small.items() if hasattr(config, name)}
    return type(config).from_dict(values)


def _is_larger(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > most


def _last(value: Any) -> Any:
    return max(value) if isinstance(value, list) and value else value


class _BareEngine(VllmEngine):
    """An engine without a tokenizer."""

    def __init__(self, folder: Path, context: EngineContext) -> None:
        self._context = context
        self._llm = start_llm(folder, context, skip_tokenizer_init=True)
        self._workers = Workers(self._llm)
        self._served = ServedVersion(context.version)

    def sampled(self, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        parameters = SamplingParams(max_tokens=count, seed=1, logprobs=0, ignore_eos=True, detokenize=False)
        completion = self._llm.generate(TokensPrompt(prompt_token_ids=prompt), parameters, use_tqdm=False)[0].outputs[0]
        tokens = list(completion.token_ids)
        return tokens, [entry[token].logprob for token, entry in zip(tokens, completion.logprobs or (), strict=True)]


def _difference(small: _SmallModel, dtype: Dtype) -> float:
    """Starts an engine, publishes to it, and returns the difference of its log-probs from transformers'."""
    destroy_model_parallel()  # of an engine before this one
    engine = _BareEngine(
        small.folder,
        EngineContext(
            model=ModelConfig(dtype=dtype, max_length=LONGEST + 16, trust_remote_code=small.trust_remote_code),
            rollout=RolloutConfig(kv_cache_gib=1 / 16),
            threads=1,
            max_samples=4,
        ),
    )
    _ALIVE.append(engine)
    differences = [_largest(engine.prompt_logprobs(small.texts), small.logprobs)]
    state = {name: tensor.to(_dtype(tensor, dtype)) for name, tensor in small.new_state.items()}
    header = plan(((name, tensor.dtype, tensor.shape) for name, tensor in state.items()), bucket_bytes=1 << 20)
    engine.begin_update(header)
    for bucket in pack(header, state.items()):
        engine.receive_bucket(bucket)
    engine.finish_update(1)
    differences.append(_largest(engine.prompt_logprobs(small.texts), small.new_logprobs))
    prompt = small.texts[1]
    tokens, logprobs = engine.sampled(prompt, 8)
    again = engine.prompt_logprobs([prompt + tokens])[0][-len(tokens) :]
    differences.append(_largest([logprobs], torch.tensor(again)))
    return max(differences)


_ALIVE: list[VllmEngine] = []  # the end of one engine would destroy the process groups of the next


def _dtype(tensor: torch.Tensor, dtype: str) -> torch.dtype:
    wanted: torch.dtype = getattr(torch, dtype)
    return wanted if tensor.is_floating_point() else tensor.dtype


def _largest(rows: Iterable[Iterable[float]], expected: torch.Tensor) -> float:
    found = torch.tensor([value for row in rows for value in row])
    return float((found - expected).abs().max())


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    verdict = trial(
        options.folder,
        dtype=options.dtype,
        max_length=options.max_length,
        trust_remote_code=options.trust_remote_code,
    )
    sys.stdout.write("\n" + json.dumps(asdict(verdict)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # vLLM's shutdown takes seconds


if __name__ == "__main__":
    main()
