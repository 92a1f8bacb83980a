"""Tries this program with each architecture of tests.families, and generates docs/architectures.md.

`python -m tests.matrix` (`make architectures`) tries all of them and writes the table. The suite tries some, and
compares their rows with it.
"""

from __future__ import annotations

import multiprocessing
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from actors.engines.contract import EngineContext
from actors.engines.hf_engine import HfEngine
from actors.learning import distributed
from actors.learning.heads import PolicyModel, ValueModel, probed
from actors.learning.learner import Learner
from actors.learning.objectives.losses import LossTerms
from actors.learning.packing import token_rows
from actors.models.model import load_causal, load_scorer
from actors.models.proofs import require_steady
from actors.text.tokenizing import load_tokenizer
from actors.weights.manifest import pack, plan
from orchestrator.config.sections import LearnerConfig, LoraConfig, ModelConfig
from orchestrator.errors import RlhfError
from tests.deadlines import scaled
from tests.families import FAMILIES, tiny_folder
from tests.numerics.ranks import group

TABLE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
PROMPTS, RESPONSES = [[5, 6, 7], [9]], [[10, 11, 12], [13, 14, 15, 16]]
MAX_LENGTH = 128
TRIAL_S = scaled(120)
TOLERANCE = 1e-4
_OFF = LoraConfig()
_COLUMNS = ("log-probs", "gradients", "no dropout", "export", "reward model", "LoRA", "HF engine", "vLLM")
_HEAD = f"""# Architectures

Support for each architecture. `make architectures` writes this page; it tries every row with tiny random
models in fp32 on a CPU. The suite tries some of the rows and compares them with this table.

- log-probs: ours equal those of transformers' own forward. gradients: ours equal autograd's through its logits.
- no dropout: a model that learns computes the same as when it scores, whatever dropouts its config sets.
- export: the learned model is written, loaded by transformers, and gives the same outputs.
- reward model: with a scalar head it learns, is written, read again, and gives the score of the sequence classifier.
- LoRA: adapters on all linear layers learn; merged, exported and read by transformers, and exported alone and read by
  peft, they give the same log-probs. "merged": peft refuses the adapter alone, or takes it for one of experts.
- HF engine, vLLM: the engine accepts and proves a publish, and its log-probs equal the trainer's. If vLLM fails this,
  `rollout.engine=auto` uses the HF engine and says why; `rollout.engine=vllm` is refused before anything starts.

| architecture | {" | ".join(_COLUMNS)} | verdict |
|---|{"---|" * len(_COLUMNS)}---|
"""


@dataclass(frozen=True)
class Row:
    """One architecture: whether each column is correct ("merged": in part), and why vLLM does not support it."""

    name: str
    right: Mapping[str, bool | str]
    refusal: str | None
    problem: str | None

    def line(self) -> str:
        found = (self.right.get(column, False) for column in _COLUMNS)
        marks = " | ".join(mark if isinstance(mark, str) else "yes" if mark else "no" for mark in found)
        return f"| {self.name} | {marks} | {self.verdict()} |"

    def verdict(self) -> str:
        if self.problem is not None:
            return f"refused: {self.problem}"
        found = "works" if self.refusal is None else f"works with HF rollouts; vLLM: {self.refusal}"
        return found if self.right["reward model"] else f"{found}. Refused as a reward model and critic"


def rows(names: Sequence[str]) -> list[Row]:
    """Tries each architecture with our learner, the HF engine and vLLM."""
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="rlhf-architectures-") as scratch, _apart() as apart:
        folders = {name: tiny_folder(name, Path(scratch) / str(number)) for number, name in enumerate(names)}
        return [_row(name, folder, apart) for name, folder in folders.items()]


def render(found: Sequence[Row]) -> str:
    return _HEAD + "".join(f"{row.line()}\n" for row in found)


def _row(name: str, folder: Path, apart: Callable[..., Any]) -> Row:
    right: dict[str, bool | str] = {}
    problem = None
    try:
        _learn_and_roll_out(folder, right)
    except RlhfError as error:
        problem = _short(str(error), folder)
    verdict = apart(_vllm_trial, folder)
    right["vLLM"] = verdict.refusal is None and verdict.untried is None
    refusal = verdict.refusal or verdict.untried
    return Row(name, right, None if refusal is None else _short(refusal, folder), problem)


def _short(text: str, folder: Path) -> str:
    """The reason without parts that differ between machines."""
    text = re.sub(r"by [0-9.e+-]+ nats", "", text.replace(str(folder), "it"))
    text = re.sub(r"^\w+Error: (1 validation error for \w+ Value error, )?", "", text)
    return re.split(r"\. |; |, so a publish|, not ", text)[0].strip(" .").replace("|", "\\|")[:110]


def _learn_and_roll_out(folder: Path, right: dict[str, bool | str]) -> None:
    """Fills in all columns except vLLM's.

    Raises:
        RlhfError: the model is refused.
    """
    expected, expected_gradient = _transformers_own(folder)
    model = PolicyModel(load_causal(folder, torch.float32), temperature=1.0, chunk=3)
    require_steady(model, lambda: probed(model))
    model.train()
    micro = token_rows(PROMPTS, RESPONSES).pack([0, 1], torch.device("cpu"))
    logprobs = model(micro)[0]
    again = model(micro)[0]
    model.eval()
    right["log-probs"] = _close(logprobs, expected)
    right["no dropout"] = torch.equal(logprobs, again) and _close(model(micro)[0], logprobs)
    found = _gradient(model.pretrained, logprobs)
    right["gradients"] = bool((found - expected_gradient).norm() < TOLERANCE * expected_gradient.norm())

    learner = _learner(PolicyModel(load_causal(folder, torch.float32), temperature=1.0))
    learner.update([micro], lambda output, _: LossTerms(output[0].sum(), {}, {}), count=7.0, what="a step")
    learned = learner.pass_through(micro)[0]
    learner.export(folder / "export", load_tokenizer(folder))
    exported, _ = _transformers_own(folder / "export")
    right["export"] = _close(exported, learned) and not _close(expected, learned)
    right["HF engine"] = _close(_hf_engine_logprobs(folder, learner), learned)
    right["reward model"] = _learns_rewards(folder)
    right["LoRA"] = learns_with_adapters(folder)


def _learns_rewards(folder: Path) -> bool:
    """Whether a reward model on this backbone learns, and is the same after export and loading."""
    micro = token_rows(PROMPTS, RESPONSES).pack([0, 1], torch.device("cpu"))
    try:
        scorer = load_scorer(folder, torch.float32, new_head="normal")
        scorer.config.pad_token_id = 1
        learner = _learner(ValueModel(scorer))
        before = learner.pass_through(micro)[1]
        learner.update([micro], lambda output, _: LossTerms(output[1].sum(), {}, {}), count=2.0, what="a step")
        learned = learner.pass_through(micro)[1]
        learner.export(folder / "reward-model", load_tokenizer(folder))
    except RlhfError:
        return False
    again = load_scorer(folder / "reward-model", torch.float32)
    with torch.no_grad():
        rows = [torch.tensor([prompt + response]) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
        scores = torch.stack([again(input_ids=row, use_cache=False).logits[0, 0] for row in rows])
    return _close(scores, learned) and bool((learned < before).all())


def learns_with_adapters(folder: Path) -> bool | str:
    """Whether adapters on all linear layers learn, and give the same merged and in peft. "merged": peft refuses the
    adapter alone, or reads it as one of experts."""
    micro = token_rows(PROMPTS, RESPONSES).pack([0, 1], torch.device("cpu"))
    try:
        learner = _learner(PolicyModel(load_causal(folder, torch.float32), temperature=1.0), LoraConfig(rank=4))
        before = learner.pass_through(micro)[0]
        for _ in range(2):  # the first step leaves A: B is zero
            learner.update([micro], lambda output, _: LossTerms(output[0].sum(), {}, {}), count=7.0, what="a step")
        learned = learner.pass_through(micro)[0]
        learner.export(folder / "lora", load_tokenizer(folder))
    except RlhfError:
        return False
    merged = AutoModelForCausalLM.from_pretrained(folder / "lora", dtype=torch.float32).eval()
    if not _close(_logprobs_of(merged).detach(), learned) or _close(before, learned):
        return False
    trunk = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    try:
        by_peft = PeftModel.from_pretrained(trunk, str(folder / "lora" / "adapter"))
    except ValueError:
        return "merged"
    return _close(_logprobs_of(by_peft).detach(), learned) or "merged"


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() < TOLERANCE)


def _transformers_own(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the responses from transformers' forward, one row at a time, and their gradient."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logprobs = _logprobs_of(model)
    return logprobs.detach(), _gradient(model, logprobs)


def _logprobs_of(model: Any) -> torch.Tensor:
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0]
        found.append(logits[len(prompt) - 1 : -1].log_softmax(-1)[range(len(response)), response])
    return torch.cat(found)


def _gradient(model: Any, logprobs: torch.Tensor) -> torch.Tensor:
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def _learner(model: PolicyModel | ValueModel, lora: LoraConfig = _OFF) -> Learner:
    distributed.join(group())
    settings = LearnerConfig(zero_stage=1, learning_rate=1e-2, lora=lora)
    return Learner(model, settings, dtype="float32", total_optimizer_steps=1)


def _hf_engine_logprobs(folder: Path, learner: Learner) -> torch.Tensor:
    """The HF engine's log-probs of the responses after a publish of the learner's weights."""
    model = ModelConfig(dtype="float32", max_length=MAX_LENGTH)
    engine = HfEngine(folder, EngineContext(model=model, threads=2, max_samples=256))
    header = plan(learner.weight_specs(), bucket_bytes=1 << 20)
    engine.begin_update(header)
    for bucket in pack(header, learner.full_weights()):
        engine.receive_bucket(bucket)
    engine.finish_update(1)
    texts = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    said = engine.prompt_logprobs(texts)
    return torch.tensor([v for row, reply in zip(said, RESPONSES, strict=True) for v in row[-len(reply) :]])


def _vllm_trial(folder: Path) -> Any:
    """The verdict for `check`, as in `jobs.check.engine`, but with vLLM imported only once."""
    from actors.engines.vllm_trial import trial  # noqa: PLC0415 (in a separate process)

    return trial(folder, dtype="float32", max_length=MAX_LENGTH)


@contextmanager
def _apart() -> Iterator[Callable[..., Any]]:
    """Runs functions in one separate process, with a deadline for each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=TRIAL_S)
        for process in (pool._processes or {}).values():
            process.kill()  # engines take seconds to shut down


ALL: Sequence[str] = tuple(FAMILIES)
