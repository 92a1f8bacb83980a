"""The output of `rlhf check`: the first prompt as the model gets it, batch arithmetic, placement, memory, disk."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Sequence

from rich.table import Table

from actors.text.conversations import Chat
from jobs.check.capacity import Capacity, capacity, find_cluster, present_cluster
from jobs.check.conversations import describe_chat
from jobs.check.nodes import check_nodes, unused_gpus
from jobs.check.preflight import Preflight, preflight
from jobs.cluster.connection import cluster as joined
from jobs.command import out, say
from jobs.prepare import Prepared
from jobs.resolve import resolved
from jobs.stages.stage import Row
from jobs.stages.table import stages_of
from orchestrator.config.config import Config
from orchestrator.errors import RlhfError
from orchestrator.planning.memory import gib
from orchestrator.run.folder import storage_root
from orchestrator.types import Prompt

SHOWN_CHARACTERS = 1500


def check(config: Config, ray_address: str | None, *, probes: bool = False) -> None:
    """Prints the findings, then raises all problems together (see Preflight.require).

    Args:
        probes: also probe the nodes, on a private Ray if no cluster is named.
    """
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
        for entry in stages_of(config):
            if rows := entry.stage.arithmetic(entry.config, found.prepared.of(entry.config)):
                _show(f"{entry.name}: batches", rows)
    problems = [*found.problems]
    prepared = None if problems else found.prepared
    for error in _of_cluster(config, ray_address, prepared, probes=probes):
        if str(error) not in map(str, problems):
            problems.append(error)
    Preflight(found.prepared, found.notes, problems).require()
    say("ok: a run can start with this config")


def _of_cluster(
    config: Config, ray_address: str | None, prepared: Prepared | None, *, probes: bool
) -> Iterator[RlhfError]:
    """Shows the plan, and yields what is wrong with the cluster."""
    wait_s = config.placement.wait_s
    try:
        if not probes:
            if unused := unused_gpus():
                say(f"warning: {unused}")
            _show_capacity(config, capacity(config, find_cluster(ray_address, wait_s=wait_s), prepared))
            return
        with joined(ray_address, wait_s=wait_s, tell=say):
            cluster, errors = asyncio.run(check_nodes(config, present_cluster()))
            yield from errors
            _show_capacity(config, capacity(config, cluster, prepared))
    except RlhfError as error:
        yield error


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
        total = memory.on_device + memory.process if slot.gpus else memory.on_cpu
        sizes = (gib(memory.state), gib(memory.working + memory.cache), gib(total))
        gpu = ", ".join(str(found.plan.number_on_node(number)) for number in slot.gpus) or "-"
        table.add_row(f"{slot.role} {slot.rank}", slot.address, str(slot.threads), gpu, *sizes)
    out.print(table)
    for need in found.nodes:
        say(need.describe())
    for warning in [*found.warnings, *_disk_warnings(config, found.disk_bytes)]:
        say(f"warning: {warning}")


def _disk_warnings(config: Config, disk_bytes: float) -> list[str]:
    root = storage_root(config.run.root)
    if not root.is_dir():
        return []  # a folder that can't be created is a separate problem
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
