"""`python -m benchmarks.lora [--rank N] [--rounds N]`: policy, critic and reference with adapters on one trunk, against
three models of which two learn completely.

A step is what the three compute for the samples of one step, one after the other on all cores: log-probs, reference's
log-probs, values, and one optimizer step each of policy and critic. Contenders compute in turns, in processes that live
for one turn: only one is in memory. The first step of a process warms up, the second is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch

from actors.groups.cluster import environment
from actors.learning.distributed import Group
from actors.learning.objectives.objective import LearnJob
from actors.models.size import model_size
from actors.roles.critic import CriticWorker
from actors.roles.policy import PolicyWorker
from actors.roles.reference import ReferenceWorker
from benchmarks.harness import Figure, Pairs, measure_turns, plain_figure, ratio_figure
from benchmarks.table import report
from benchmarks.turns import Answer, Contender, parsed
from benchmarks.work import Work, experience, load_work
from jobs.stages.settings import rank_context
from orchestrator.watching.telemetry import resident_bytes

OVERRIDES = (
    "model.dtype=float32",
    "rl.prompts_per_step=4",
    "algorithm.minibatches=1",
    "policy.zero_stage=0",
    "critic.zero_stage=0",
)
MODELS = ("policy", "critic", "reference")
GIB = 1 << 30
AIM = 0.6
DEADLINE_S = 1800.0  # a process starts, loads and computes for every turn, on a machine that may be busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parsed(parser, _build)
    report("lora", measure(arguments.rank, arguments.rounds))


def measure(rank: int, rounds: int) -> list[Figure]:
    answers: dict[str, list[Answer]] = {role: [] for role in (*MODELS, "shared")}

    def turn(roles: Sequence[str]) -> Callable[[], float]:
        def seconds() -> float:
            for role in roles:
                answers[role].append(_asked(role, rank))
            return float(sum(answers[role][-1]["seconds"] for role in roles))

        return seconds

    shared_s, apart_s = measure_turns([turn(["shared"]), turn(MODELS)], rounds=rounds)
    size = model_size(load_work("quickstart", *OVERRIDES).folder)
    work = load_work("quickstart", *OVERRIDES, f"policy.lora.rank={rank}")
    learned = 2 * size.adapter_params(work.config.policy.lora)
    memory = {role: [answer["bytes"] / GIB for answer in found] for role, found in answers.items()}
    together = [sum(sizes) for sizes in zip(*(memory[role] for role in MODELS), strict=True)]
    detail = f"{learned / 1e6:.1f} million parameters learn of {2 * size.num_params / 1e6:.0f}"
    return [
        ratio_figure("lora step ÷ full", Pairs(shared_s, apart_s), "s", better="lower", target=AIM, detail=detail),
        ratio_figure(
            "lora memory ÷ full",
            Pairs(memory["shared"], together),
            "GiB",
            better="lower",
            detail="resident, after a step",
        ),
        *(plain_figure(f"full memory: {role}", memory[role], "GiB", better="lower") for role in MODELS),
        *(
            plain_figure(f"full step: {role}", [answer["seconds"] for answer in answers[role]], "s", better="lower")
            for role in MODELS
        ),
    ]


def _asked(role: str, rank: int) -> Answer:
    variables = environment(torch.get_num_threads(), on_gpu=torch.cuda.is_available())
    options = {"role": role, "rank": rank}
    with Contender("benchmarks.lora", options, variables, deadline_s=DEADLINE_S) as contender:
        contender.ask()
        return contender.ask()


def _build(options: Mapping[str, Any]) -> Callable[..., Answer]:
    role, rank = options["role"], options["rank"]
    keys = (f"policy.lora.rank={rank}", f"critic.lora.rank={rank}") if role == "shared" else ()
    work = load_work("quickstart", *OVERRIDES, *keys)
    table, calls = experience(work), _calls(role, work)

    def answer() -> Answer:
        started = perf_counter()
        for call in calls:
            call(table)
        return {"seconds": perf_counter() - started, "bytes": resident_bytes()}

    return answer


def _calls(role: str, work: Work) -> Sequence[Callable[[Any], object]]:
    """What a role computes in a step."""
    config, context = work.config, rank_context(work.config)
    group, job = Group(threads=torch.get_num_threads()), LearnJob(0, 0.0, 1.0, 0.0, 0)
    if role == "reference":
        return (ReferenceWorker(config.reference, context, group).logprobs,)
    if role == "critic":
        critic = CriticWorker(config.critic, context, group)
        return critic.values, lambda table: critic.learn([table], job)
    shared = role == "shared"
    policy = PolicyWorker(config.policy, context, group, critic=config.critic if shared else None)
    own = (policy.logprobs, lambda table: policy.learn([table], job))
    of_critic = (policy.critic_values, lambda table: policy.critic_learn([table], job))
    return (policy.reference_logprobs, *own, *of_critic) if shared else own


if __name__ == "__main__":
    main()
