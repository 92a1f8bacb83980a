"""`rlhf check --cluster`: the nodes of a cluster, the connections between them, and one small all-reduce per group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from actors.groups.group_probe import COLLECTIVE_S, probe_group
from actors.groups.probes import Findings, NodeFacts, probe_nodes
from actors.groups.starter import placed
from actors.machine.devices import driver_cuda, driver_release, installed_build, why_no_gpu, why_not_this
from jobs.check.capacity import Cluster
from jobs.command import out, say
from jobs.stages.table import stages_of
from orchestrator.config.config import Config
from orchestrator.errors import CapacityError, RlhfError
from orchestrator.failures import LEARNERS
from orchestrator.planning.demands import all_demands
from orchestrator.planning.memory import GIB, gib
from orchestrator.planning.needs import NodeOffer
from orchestrator.planning.placement import Demand, Node, Plan

FREE = 0.9  # a device with less free memory is in use
SHARED_BYTES = GIB  # NCCL's buffers for eight GPUs, and room for Ray's objects
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Group:
    """The ranks of a role that compute together, and the demands with which they are placed."""

    role: str
    demands: Sequence[Demand]
    mode: str
    num_ranks: int


async def check_nodes(config: Config, cluster: Cluster) -> tuple[Cluster, list[RlhfError]]:
    """Probes the cluster, and prints what it finds. Returns the cluster with the memory of its GPUs, and problems."""
    found = await probe_nodes(cluster.nodes)
    _show(found)
    problems = [CapacityError(text) for text in problems_of(found, cluster.nodes)]
    for line in warnings_of(found):
        say(f"warning: {line}")
    errors: list[RlhfError] = [*problems]
    for group in groups_of(config, cluster.nodes):
        try:
            say(await _try(config, group))
        except RlhfError as error:
            errors.append(error)
    return with_gpu_memory(cluster, found.facts), errors


def unused_gpus() -> str | None:
    """Why torch can't use the GPUs of this machine. None: it can, or there is no driver."""
    cuda = driver_cuda()
    reason = None if cuda is None else why_no_gpu(installed_build(), cuda, driver_release())
    return None if reason is None else f"GPUs of this machine can't be used: {reason}"


def with_gpu_memory(cluster: Cluster, facts: Mapping[str, NodeFacts]) -> Cluster:
    """Ray knows at most the kind of GPUs. The smallest one of a node counts."""
    offers: dict[str, NodeOffer] = dict(cluster.offers)
    for address, node in facts.items():
        if node.devices and address in offers:
            offers[address] = replace(offers[address], gpu_memory=min(device.total_bytes for device in node.devices))
    return replace(cluster, offers=offers)


def _show(found: Findings) -> None:
    table = Table("node", "torch", "driver", "GPUs", "free of each", title="nodes")
    for address, node in sorted(found.facts.items()):
        driver = f"{node.release}, CUDA {node.cuda[0]}.{node.cuda[1]}" if node.cuda else "-"
        names = ", ".join(dict.fromkeys(device.name for device in node.devices)) or "-"
        gpus = f"{len(node.devices)} × {names}" if node.devices else "-"
        free = gib(min(device.free_bytes for device in node.devices)) if node.devices else "-"
        table.add_row(address, node.versions.get("torch", "-"), driver, gpus, free)
    out.print(table)
    pairs = len(found.latency_s) + len(found.cut)
    if pairs:
        slowest = max(found.latency_s.values(), default=0.0)
        say(f"connections: {len(found.latency_s)} of {pairs} answer, the slowest after {1000 * slowest:.1f} ms")


def problems_of(found: Findings, nodes: Sequence[Node]) -> Iterator[str]:
    """What a run would fail on, with the way out."""
    for address, reason in sorted(found.silent.items()):
        yield f"node {address}: its probe does not answer ({reason}). See `ray status`; restart or remove the node."
    for node in nodes:
        facts = found.facts.get(node.address)
        if facts is not None:
            yield from (f"node {node.address}: {problem}" for problem in _problems_of_node(facts, node.gpus))
    yield from _other_packages(found.facts)
    if found.cut:
        shown = [f"{a} to {b}, {reason}" for (a, b), reason in sorted(found.cut.items())]
        more = f", and {len(shown) - 4} more" if len(shown) > 4 else ""
        yield (
            f"{len(shown)} connections between nodes fail: {'; '.join(shown[:4])}{more}. Ray, NCCL and gloo use ports "
            "that the kernel chooses: allow all TCP between the nodes (firewall, security group, NetworkPolicy)."
        )


def _problems_of_node(facts: NodeFacts, num_gpus: float) -> Iterator[str]:
    if num_gpus:
        reason = why_no_gpu(facts.build, facts.cuda, facts.release)
        if reason is not None:
            yield f"Ray offers {num_gpus:g} GPUs, and {reason}"
        elif len(facts.devices) != num_gpus:
            yield (
                f"Ray offers {num_gpus:g} GPUs, and its processes see {len(facts.devices)}. Start Ray there with the "
                "right --num-gpus, or give its container the GPUs (nvidia.com/gpu)."
            )
    yield from dict.fromkeys(filter(None, (why_not_this(device, facts.build) for device in facts.devices)))
    for name in INTERFACES:
        wanted = facts.network.get(name, "")
        if wanted and not any(_fits(each, wanted) for each in facts.interfaces):
            yield f"{name}={wanted}, and the node has {', '.join(facts.interfaces)}. Correct or unset the variable."


def _fits(interface: str, wanted: str) -> bool:
    """NCCL's syntax: prefixes; =NAME is exact; ^ in front names those that are left out. Gloo's names are exact."""
    out_of, names = wanted.startswith("^"), wanted.lstrip("^")
    exact, listed = names.startswith("="), names.lstrip("=").split(",")
    named = any(interface == name if exact else interface.startswith(name) for name in listed)
    return named != out_of


def _other_packages(facts: Mapping[str, NodeFacts]) -> Iterator[str]:
    versions = {address: node.versions for address, node in sorted(facts.items())}
    for package in dict.fromkeys(name for found in versions.values() for name in found):
        by_release: dict[str, list[str]] = {}
        for address, found in versions.items():
            by_release.setdefault(found.get(package, "none"), []).append(address)
        if len(by_release) > 1:
            shown = "; ".join(f"{release} on {', '.join(addresses)}" for release, addresses in by_release.items())
            yield f"nodes have different releases of {package}: {shown}. Use one image, or one lock file, on all nodes."


def warnings_of(found: Findings) -> Iterator[str]:
    for address, node in sorted(found.facts.items()):
        for number, device in enumerate(node.devices):
            if device.free_bytes < FREE * device.total_bytes:
                yield (
                    f"node {address}: {gib(device.free_bytes)} of {gib(device.total_bytes)} are free on GPU {number}; "
                    "another process uses it. `nvidia-smi` there names it."
                )
        apart = [n for n, device in enumerate(node.devices) if len(device.peers) < len(node.devices) - 1]
        if apart:
            yield (
                f"node {address}: GPUs {', '.join(map(str, apart))} can't access the memory of all others directly; "
                "NCCL copies through the host there, which is slower."
            )
        if len(node.devices) > 1 and node.shared_bytes is not None and node.shared_bytes < SHARED_BYTES:
            yield (
                f"node {address}: /dev/shm has {gib(node.shared_bytes)}; NCCL and Ray share memory there. Give the "
                f"container at least {gib(SHARED_BYTES)} (an emptyDir with medium: Memory)."
            )


def groups_of(config: Config, nodes: Sequence[Node]) -> list[Group]:
    """The process groups of several ranks that the stages of a config make; without those that do not fit."""
    groups: dict[str, Group] = {}
    for entry in stages_of(config):
        try:
            plan: Plan = entry.stage.plan(entry.config, nodes)
        except CapacityError:
            continue  # reported with the plan
        for role in dict.fromkeys(slot.role for slot in plan.slots):
            slots, together = plan.of(role), all_demands(entry.config)
            if len(slots) < 2 or role in groups or not _computes_together(entry.config, role, together):
                continue
            if role in {demand.role for demand in together}:
                groups[role] = Group(role, together, entry.config.placement.mode, len(slots))
            else:
                alone = Demand(role, len(slots), slots[0].threads, len(slots[0].gpus), is_whole=True)
                groups[role] = Group(role, [alone], "separate", len(slots))
    return list(groups.values())


def _computes_together(config: Config, role: str, of_loop: Sequence[Demand]) -> bool:
    """Whether the ranks of a role are one process group."""
    if role == "reference":
        return config.reference.sharded
    return role in LEARNERS or role not in {demand.role for demand in of_loop}


async def _try(config: Config, group: Group) -> str:
    """Raises CapacityError: the ranks do not come together."""
    where = ""
    try:
        async with placed(
            group.demands, mode=group.mode, wait_s=config.placement.wait_s, collective_s=COLLECTIVE_S, tell=say
        ) as starter:
            where = ", ".join(slot.address for slot in starter.plan.of(group.role))
            seconds = await probe_group(starter, group.role)
    except CapacityError:
        raise
    except RlhfError as error:
        raise CapacityError(
            f"the {group.num_ranks} ranks of {group.role} (on {where}) do not come together: "
            f"{str(error).rstrip('.')}. Name the network "
            "interface that connects these nodes in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO shows "
            "what NCCL tries."
        ) from error
    return f"group {group.role}: {group.num_ranks} ranks on {where} reduce a number in {1000 * seconds:.0f} ms"
