"""The work of benchmarks: SmolLM2-135M on the quickstart's prompts, and on GSM8K with its answers as responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actors.models.model import resolve_model
from actors.text.tokenizing import load_tokenizer
from jobs.prepare import prepare
from jobs.resolve import resolved
from orchestrator.config.config import Config
from orchestrator.config.loader import load_config
from orchestrator.types import Prompt

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "jobs" / "configs" / "ppo.yaml"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k-train.jsonl.gz"
NAMES = ("quickstart", "gsm8k")
ENDED_EARLY = 0.1  # share of the quickstart's responses that end before max_new_tokens
_GSM8K_SETTINGS = (
    f"prompts.path={GSM8K}",
    "prompts.limit=400",
    "prompts.max_prompt_tokens=256",
    "model.max_length=512",
    "rollout.max_new_tokens=192",
    "policy.micro_batch_tokens=2048",
    "critic.micro_batch_tokens=2048",
    "rl.prompts_per_step=16",
    "algorithm.minibatches=1",
)


@dataclass(frozen=True, eq=False)
class Work:
    """The samples of one step, and the config that the loop would use for them."""

    name: str
    config: Config
    prompts: Sequence[Prompt]

    @property
    def dtype(self) -> torch.dtype:
        """Compute type of ours and of the references: the machine's faster type unless given."""
        dtype: torch.dtype = getattr(torch, self.config.model.compute_dtype)
        return dtype

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return resolve_model(self.config.model.path, self.config.run.cache)


def available() -> list[str]:
    """Names of the work whose data exists."""
    return [name for name in NAMES if name != "gsm8k" or GSM8K.exists()]


def load_work(name: str, *overrides: str) -> Work:
    """Raises DataError if its data is missing."""
    config = load_config(QUICKSTART, [*(_GSM8K_SETTINGS if name == "gsm8k" else ()), *overrides])
    config = resolved(config, tell=lambda line: None)
    prompts = prepare(config).prompts.train
    return Work(name, config, prompts[: config.rl.prompts_per_step])


def experience(work: Work) -> pa.Table:
    """A table with all columns that scorers and learners read, with random values but realistic lengths.

    GSM8K's responses are its answers, cut at max_new_tokens. The quickstart's are max_new_tokens random tokens, except
    for a share ENDED_EARLY, because its model rarely ends earlier.
    """
    generator = np.random.default_rng(0)
    responses = _responses(work, generator)
    lengths = [len(response) for response in responses]
    floats = {
        name: [generator.normal(0.0, 0.1, length).astype(np.float32) for length in lengths]
        for name in ("advantages", "values", "returns")
    }
    for name in ("old_logprobs", "ref_logprobs", "engine_logprobs"):
        floats[name] = [generator.normal(-2.0, 0.1, length).astype(np.float32) for length in lengths]
    tokens = pa.list_(pa.int32())
    return pa.table(
        {
            "row": pa.array(range(len(responses)), pa.int32()),
            "prompt_tokens": pa.array([prompt.tokens for prompt in work.prompts], tokens),
            "response_tokens": pa.array(responses, tokens),
            "learn": pa.array([[True] * length for length in lengths], pa.list_(pa.bool_())),
            **{name: pa.array(values, pa.list_(pa.float32())) for name, values in floats.items()},
        }
    )


def _responses(work: Work, generator: np.random.Generator) -> list[list[int]]:
    longest = work.config.rollout.max_new_tokens
    if work.name == "gsm8k":
        tokenizer: Any = load_tokenizer(work.folder)
        answers = [str(prompt.meta["answer"]) for prompt in work.prompts]
        return [
            [*ids, tokenizer.eos_token_id][:longest]
            for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]
        ]
    lengths = [
        int(generator.integers(4, longest)) if generator.random() < ENDED_EARLY else longest for _ in work.prompts
    ]
    return [generator.integers(100, 40_000, length).tolist() for length in lengths]
