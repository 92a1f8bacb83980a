"""`python -m benchmarks.learner [--role both|policy|critic] [--rounds N]`: learning against loops in plain PyTorch.

Policy and critic learn as in the loop: concurrently, each on the cores from the config. A plain loop trains both
sequentially in one process. With `--role policy` one model learns alone, on all cores. All contenders have the same
rows and number of optimizer steps. Counts are real tokens of prompts and responses, without padding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actors.groups.cluster import environment
from actors.learning.distributed import Group
from actors.learning.objectives.objective import LearnJob
from actors.models.size import model_size
from actors.roles.critic import CriticWorker
from actors.roles.policy import PolicyWorker
from benchmarks.harness import Figure, Pairs, measure_turns, ratio_figure
from benchmarks.plain_loop import STYLES, PlainLoop
from benchmarks.table import report
from benchmarks.turns import Answer, Contender, parsed
from benchmarks.work import Work, available, experience, load_work
from jobs.stages.settings import rank_context
from orchestrator.planning.memory import ModelSize

ROLES = ("policy", "critic")
# One minibatch: 16 rows of the quickstart, or about as many tokens of longer rows.
OVERRIDES = {
    "quickstart": ("rl.prompts_per_step=16", "algorithm.minibatches=1"),
    "gsm8k": ("rl.prompts_per_step=8", "algorithm.minibatches=1"),
}
TARGETS = {"plain": 1.8, "tuned": 1.2, "masters": None}
GEMM_SIZE = 4096

Learn = Callable[[Work, pa.Table, int], None]


@dataclass(frozen=True)
class Team:
    """Processes that compute concurrently."""

    contenders: Sequence[Contender]

    def tokens_per_s(self, work: str, rows_per_forward: int) -> float:
        started = perf_counter()
        for contender in self.contenders:
            contender.begin(work=work, rows_per_forward=rows_per_forward)
        tokens = [contender.answer()["tokens"] for contender in self.contenders]
        return float(sum(tokens)) / (perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=("both", *ROLES), default="both")
    parser.add_argument("--work", choices=available(), action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="rows per forward in the plain loops, instead of the fastest")
    arguments = parsed(parser, _build)
    works, role = arguments.work or available(), arguments.role
    report(f"learner-{role}", measure(role, works, arguments.rounds, arguments.rows))


def measure(role: str, works: Sequence[str], rounds: int, rows: int | None) -> list[Figure]:
    roles = ROLES if role == "both" else (role,)
    with ExitStack() as stack:
        started = partial(_started, stack)
        teams = {"ours": Team([started("ours", [item], _threads(item, roles)) for item in roles])}
        # Three pairs of models with fp32 masters do not fit into 24 GiB.
        kinds = [kind for kind in TARGETS if kind != "masters" or len(roles) == 1]
        teams |= {kind: Team([started(kind, list(roles), torch.get_num_threads())]) for kind in kinds}
        return [figure for work in works for figure in _measure_work(roles, work, teams, rounds, rows)]


def _threads(role: str, roles: Sequence[str]) -> int:
    if len(roles) == 1:
        return torch.get_num_threads()
    config = load_work("quickstart").config
    return int({"policy": config.policy, "critic": config.critic}[role].cpus_per_rank)


def _started(stack: ExitStack, kind: str, roles: list[str], threads: int) -> Contender:
    variables = {} if kind == "plain" else environment(threads, on_gpu=torch.cuda.is_available())
    return stack.enter_context(Contender("benchmarks.learner", {"kind": kind, "roles": roles}, variables))


def _measure_work(
    roles: Sequence[str], name: str, teams: Mapping[str, Team], rounds: int, rows: int | None
) -> list[Figure]:
    settings = {kind: rows or (STYLES[kind].rows_per_forward[name] if kind in STYLES else 0) for kind in teams}
    turns = [partial(team.tokens_per_s, name, settings[kind]) for kind, team in teams.items()]
    for warm_up in turns:
        warm_up()
    *measured, gemm = measure_turns([*turns, partial(gemm_flops, load_work(name).dtype)], rounds=rounds)
    speeds = dict(zip(teams, measured, strict=True))
    title = f"learner {'+'.join(roles)} {name}"
    figures = [
        ratio_figure(
            f"{title} ÷ {kind} loop",
            Pairs(speeds["ours"], speeds[kind]),
            "tokens/s",
            target=TARGETS[kind],
            detail=f"{settings[kind]} rows per forward in the loop",
        )
        for kind in teams
        if kind != "ours"
    ]
    work = load_work(name, *OVERRIDES[name])
    table = experience(work)
    flops = sum(model_flops(table, model_size(work.folder), role) for role in roles) / len(roles) / num_tokens(table)
    utilisation = ratio_figure(
        f"{title}: model FLOP utilisation",
        Pairs([speed * flops for speed in speeds["ours"]], gemm),
        "FLOP/s",
        detail=f"over a GEMM of {GEMM_SIZE}³ of the same type on all cores",
    )
    return [*figures, utilisation]


def num_tokens(table: pa.Table) -> int:
    """Prompt and response tokens."""
    return sum(len(table[name].combine_chunks().flatten()) for name in ("prompt_tokens", "response_tokens"))


def model_flops(table: pa.Table, size: ModelSize, role: str) -> float:
    """Necessary FLOPs of one epoch, forward and backward: 6 per weight and token in the layers, 6 per weight and
    response token in the LM head, and causal attention, without padding and recomputation."""
    responses = np.array([len(row) for row in table["response_tokens"].to_pylist()])
    lengths = responses + np.array([len(row) for row in table["prompt_tokens"].to_pylist()])
    embedding = size.vocabulary * size.hidden
    head = 6.0 * embedding * responses.sum() if role == "policy" else 0.0
    attention = 6.0 * size.num_layers * size.hidden * (lengths.astype(float) ** 2).sum()
    return float(6.0 * (size.num_params - embedding) * lengths.sum() + head + attention)


def _build(options: Mapping[str, Any]) -> Callable[..., Answer]:
    works = {name: load_work(name, *OVERRIDES[name]) for name in available()}
    tables = {name: experience(work) for name, work in works.items()}
    first, kind = works["quickstart"], options["kind"]
    make = _ours if kind == "ours" else partial(_loop, STYLES.get(kind))
    learners = [make(role, first) for role in options["roles"]]

    def answer(*, work: str, rows_per_forward: int) -> Answer:
        for learn in learners:
            learn(works[work], tables[work], rows_per_forward)
        return {"tokens": num_tokens(tables[work]) * len(learners)}

    return answer


def _ours(role: str, first: Work) -> Learn:
    config = first.config
    context, group = rank_context(config), Group(threads=torch.get_num_threads())
    worker = (
        PolicyWorker(config.policy, context, group) if role == "policy" else CriticWorker(config.critic, context, group)
    )

    def learn(work: Work, table: pa.Table, rows_per_forward: int) -> None:
        worker.micro_batch_tokens = work.config.policy.micro_batch_tokens
        worker.algorithm = work.config.algorithm
        worker.learn([table], LearnJob(0, 0.0, 1.0, 0.0, 0))

    return learn


def _loop(style: Any, role: str, first: Work) -> Learn:
    loop = PlainLoop(role, style, first)
    return lambda work, table, rows: loop.learn(
        table, minibatches=work.config.algorithm.minibatches, rows_per_forward=rows
    )


def gemm_flops(dtype: torch.dtype) -> float:
    """The fastest of several matrix products, in FLOP/s."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype)
    seconds = []
    for _ in range(6):
        started = perf_counter()
        left @ left
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(perf_counter() - started)
    return 2.0 * GEMM_SIZE**3 / min(seconds)


if __name__ == "__main__":
    main()
