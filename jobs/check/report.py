"""What `rlhf check` prints: the first prompt as the model gets it, batch arithmetic, placement, memory, disk."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence

from rich.table import Table

from actors.text.conversations import Chat
from jobs.check.capacity import Capacity, capacity, find_cluster
from jobs.check.conversations import describe_chat
from jobs.check.preflight import Preflight, preflight
from jobs.command import out, say
from jobs.resolve import resolved
from jobs.stages.settings import loop_settings
from orchestrator.algorithms.schedule import learning_rate
from orchestrator.config.config import Config
from orchestrator.config.sections import LearnerConfig
from orchestrator.errors import RlhfError
from orchestrator.planning.memory import gib
from orchestrator.run.folder import storage_root
from orchestrator.types import Prompt

SHOWN_CHARACTERS = 1500

Row = tuple[str, str]


def check(config: Config, ray_address: str | None) -> None:
    """Prints what was found, then raises what is wrong, all of it at once (see Preflight.require)."""
    config = resolved(config)
    found = preflight(config)
    for note in found.notes:
        say(note)
    if found.prepared is not None:
        prompts = found.prepared.prompts
        for prompt in (prompts.train or prompts.reward_model or prompts.held_out)[:1]:
            _show_prompt(found.prepared.chat, prompt)
        for line in describe_chat(found.prepared.chat):
            say(line)
        if "ppo" in config.stages:
            _show("batches", batch_rows(config, len(prompts.train)))
    problems = [*found.problems]
    try:
        cluster = find_cluster(ray_address, wait_s=config.placement.wait_s)
        _show_capacity(config, capacity(config, cluster))
    except RlhfError as error:
        if str(error) not in map(str, problems):
            problems.append(error)
    Preflight(found.prepared, found.notes, problems).require()
    say("ok: a run can start with this config")


def batch_rows(config: Config, num_prompts: int) -> list[Row]:
    """The arithmetic of one PPO step and of the run, as (name, value)."""
    rl, algorithm, rollout = config.rl, config.algorithm, config.rollout
    samples = config.samples_per_step
    shards = math.ceil(samples / rollout.samples_per_shard)
    per_step = algorithm.epochs * algorithm.minibatches
    policy_steps = max(rl.steps - loop_settings(config, rl.steps).critic_warmup_steps, 0) * per_step
    optimizer_steps = f"policy {policy_steps}" + (f", critic {rl.steps * per_step}" if algorithm.needs_critic else "")
    critic_rates = (
        [("learning rate, critic", _rates(config.critic, rl.steps * per_step))] if algorithm.needs_critic else []
    )
    epochs = rl.steps * rl.prompts_per_step / num_prompts if num_prompts else math.inf
    return [
        ("samples per step", f"{rl.prompts_per_step} prompts × {rl.samples_per_prompt} = {samples}"),
        ("shards per step", f"{shards} of at most {rollout.samples_per_shard}, on {rollout.replicas} engines"),
        ("tokens per step", f"at most {samples * config.model.max_length:,}"),
        (
            "optimizer steps per step",
            f"{algorithm.epochs} epochs × {algorithm.minibatches} minibatches of {samples // algorithm.minibatches} "
            f"samples = {per_step}",
        ),
        ("optimizer steps in all", f"{optimizer_steps}, in {rl.steps} steps"),
        ("learning rate, policy", _rates(config.policy, rl.steps * per_step)),
        *critic_rates,
        ("passes over the prompts", f"{rl.steps * rl.prompts_per_step} of {num_prompts} prompts = {epochs:.2f}"),
        *_best_checkpoint(config),
    ]


def _best_checkpoint(config: Config) -> list[Row]:
    """Which steps compete: those that are both saved and evaluated."""
    checkpoints, evaluation, last = config.checkpoints, config.evaluation, config.rl.steps
    if checkpoints.best_metric is None or not evaluation.prompts:
        return []
    common = math.lcm(checkpoints.every_steps, evaluation.every_steps)  # 0: one of them comes after the last step only
    earlier = list(range(common, last, common)) if common else []
    if not earlier:
        return [("best checkpoint", "the last: no earlier step is both saved and evaluated")]
    shown = ", ".join(map(str, earlier[:3])) + (", ..." if len(earlier) > 3 else "")
    return [("best checkpoint", f"by {checkpoints.best_metric}, among steps {shown} and {last}")]


def _rates(learner: LearnerConfig, total: int) -> str:
    def rate(step: int) -> float:
        return learning_rate(
            step,
            peak=learner.learning_rate,
            schedule=learner.schedule,
            warmup_optimizer_steps=learner.warmup_optimizer_steps,
            total_optimizer_steps=total,
        )

    text = f"{learner.schedule}: {rate(0):.2e} at the first, {rate(total - 1):.2e} at the last of {total}"
    if learner.warmup_optimizer_steps:
        text += f", {learner.learning_rate:.2e} after {learner.warmup_optimizer_steps}"
    return text


def _show_prompt(chat: Chat, prompt: Prompt) -> None:
    text = chat.text(prompt.tokens)
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."
    say(f"prompt {prompt.id!r} as the model gets it, {len(prompt.tokens)} tokens:")
    say("\n".join(f"  | {line}" for line in shown.splitlines()))


def _show_capacity(config: Config, found: Capacity) -> None:
    slots = found.plan.slots
    table = Table("actor", "node", "threads", "GPU", "state", "working", "total", title=f"plan: {found.cluster.what}")
    for slot in slots:
        memory = found.memory_of[slot.role]
        total = memory.on_device + memory.process if slot.gpu_share else memory.on_cpu
        sizes = (gib(memory.state), gib(memory.working + memory.cache), gib(total))
        gpu = f"{slot.gpu_share:g}" if slot.gpu_share else "-"
        table.add_row(f"{slot.role} {slot.rank}", slot.address, str(slot.threads), gpu, *sizes)
    out.print(table)
    for need in found.nodes:
        say(need.describe())
    for warning in [*found.warnings, *_disk_warnings(config, found.disk_bytes)]:
        say(f"warning: {warning}")


def _disk_warnings(config: Config, disk_bytes: float) -> list[str]:
    root = storage_root(config.run.root)
    if not root.is_dir():
        return []  # that it can't be made is a problem of its own
    free = shutil.disk_usage(root).free
    say(f"disk: a run writes at most about {gib(disk_bytes)}; free in run.root: {gib(free)}")
    if disk_bytes <= free:
        return []
    return ["the disk may fill up: free space, point run.root elsewhere, or lower checkpoints.keep."]


def _show(title: str, rows: Sequence[Row]) -> None:
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    out.print(table)
