"""`python -m benchmarks.scoring [--rounds N]`: reference, critic and reward against one Hugging Face forward.

Both run in one process, with our allocator and on the same rows. The forward uses padded batches sorted by length, of
the fastest size. For the reference it computes log-probs from its logits, for the others a value at each position.
Counts are real tokens of prompts and responses, without padding.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import pyarrow as pa
import torch

from actors.groups.cluster import environment
from actors.learning.distributed import Group
from actors.models.model import load_causal, load_scorer
from actors.rewards.model import RewardModel
from actors.roles.critic import CriticWorker
from actors.roles.reference import ReferenceWorker
from actors.text.conversations import load_chat
from benchmarks.harness import Figure, measure_pairs, ratio_figure
from benchmarks.learner import num_tokens
from benchmarks.plain_loop import padded
from benchmarks.table import report
from benchmarks.turns import Answer, Contender, parsed
from benchmarks.work import Work, available, experience, load_work
from jobs.stages.settings import rank_context
from orchestrator.config.rewards import ModelRewardConfig

ROLES = ("reference", "critic", "reward")
TRIED_ROWS = (4, 16, 64)

Score = Callable[[pa.Table], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=ROLES, action="append")
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parsed(parser, _build)
    report("scoring", [figure for role in arguments.role or ROLES for figure in measure(role, arguments.rounds)])


def measure(role: str, rounds: int) -> list[Figure]:
    variables = environment(torch.get_num_threads(), on_gpu=torch.cuda.is_available())
    with Contender("benchmarks.scoring", {"role": role}, variables) as contender:
        return [_measure_work(contender, role, work, rounds) for work in available()]


def _measure_work(contender: Contender, role: str, work: str, rounds: int) -> Figure:
    def tokens_per_s(rows_per_forward: int) -> float:
        return float(contender.ask(work=work, rows_per_forward=rows_per_forward)["tokens_per_s"])

    tokens_per_s(0), tokens_per_s(TRIED_ROWS[0])
    rows = max(TRIED_ROWS, key=tokens_per_s)
    pairs = measure_pairs(partial(tokens_per_s, 0), partial(tokens_per_s, rows), pairs=rounds)
    detail = f"scoring, {rows} rows per forward in the reference"
    return ratio_figure(f"{role} {work} ÷ HF forward", pairs, "tokens/s", detail=detail)


def _build(options: Mapping[str, Any]) -> Callable[..., Answer]:
    works = {name: load_work(name) for name in available()}
    tables = {name: experience(work) for name, work in works.items()}
    first = next(iter(works.values()))
    ours = _SCORERS[options["role"]](first)
    model = _plain_model(options["role"], first)

    def answer(*, work: str, rows_per_forward: int) -> Answer:
        started = perf_counter()
        if rows_per_forward:
            _forward(model, tables[work], rows_per_forward)
        else:
            ours(tables[work])
        return {"tokens_per_s": num_tokens(tables[work]) / (perf_counter() - started)}

    return answer


def _reference(work: Work) -> Score:
    config = work.config
    return ReferenceWorker(config.reference, rank_context(config), Group(threads=torch.get_num_threads())).logprobs


def _critic(work: Work) -> Score:
    config = work.config
    return CriticWorker(config.critic, rank_context(config), Group(threads=torch.get_num_threads())).values


def _reward(work: Work) -> Score:
    reward = work.config.reward
    assert isinstance(reward, ModelRewardConfig)
    with tempfile.TemporaryDirectory() as folder:
        load_scorer(work.folder, work.dtype, new_head="normal").save_pretrained(folder)
        chat = load_chat(work.folder)
        chat.tokenizer.save_pretrained(folder)
        return RewardModel(
            Path(folder),
            chat,
            dtype=work.dtype,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            micro_batch_tokens=reward.micro_batch_tokens,
            normalise=False,
        ).scores


_SCORERS: Mapping[str, Callable[[Work], Score]] = {"reference": _reference, "critic": _critic, "reward": _reward}


def _plain_model(role: str, work: Work) -> Any:
    dtype = work.dtype
    if role == "reference":
        model = load_causal(work.folder, dtype)
    else:
        model = load_scorer(work.folder, dtype, new_head="normal")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _forward(model: Any, table: pa.Table, rows_per_forward: int) -> list[list[float]]:
    columns = {name: table[name].to_pylist() for name in table.column_names}
    lengths = [len(p) + len(r) for p, r in zip(columns["prompt_tokens"], columns["response_tokens"], strict=True)]
    order = sorted(range(table.num_rows), key=lambda row: -lengths[row])
    found: list[list[float]] = []
    for start in range(0, len(order), rows_per_forward):
        batch = padded(columns, order[start : start + rows_per_forward], model.device)
        inputs = {"input_ids": batch["ids"], "attention_mask": batch["attention"], "use_cache": False}
        if hasattr(model, "score"):
            hidden_BTD = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state
            found += model.score(hidden_BTD).squeeze(-1).float().tolist()
        else:
            logprobs_BTV = torch.log_softmax(model(**inputs).logits[:, :-1].float(), dim=-1)
            found += logprobs_BTV.gather(-1, batch["ids"][:, 1:, None]).squeeze(-1).tolist()
    return found


if __name__ == "__main__":
    main()
