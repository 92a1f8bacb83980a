"""The Ray cluster: connecting to it, its resources, and reserving those of a plan."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import ray
from ray._private import ray_constants, services
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # a compiled module
from ray.exceptions import AuthenticationError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from actors.machine import allocator
from orchestrator.errors import CapacityError, ConfigError
from orchestrator.planning.placement import Demand, Node, Plan, Slot, place

# Roles share cores, and a thread that spins for the next parallel region takes a core from another role: next to a busy
# process a transpose in 96 regions took 190 to 330 ms, with these spins 71 to 77, alone 45. Shorter spins slow down an
# engine: a shard took 3.5 s by default, 3.6 with these, 4.7 with 1,000.
SPINS = {"GOMP_SPINCOUNT": "10000"}
# oneDNN caches 1,024 compiled kernels, one per shape, and torch's binding to it caches 1,024 more. Micro-batches differ
# in shape: after 800 of a tiny model a process had 1,100 MB, with the first cache at 64 735, with both at 64 445. It
# took the same time.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "16"}
QUIET_WAIT_S = 5.0
_ASKED = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"  # any call that needs the token
LEAVE_S = 5.0
_RAY_UNIT = 1e-4
PASSED_ON = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")
NETWORK = ("NCCL_", "TORCH_NCCL_", "GLOO_")


@dataclass(frozen=True)
class Address:
    """The address of a cluster, and its source: a name for messages.

    Args:
        text: host:port of its control service.
        is_private: a private Ray, entirely on loopback.
    """

    text: str
    source: str
    is_private: bool = False

    def __str__(self) -> str:
        return f"{self.text} ({self.source})"


def named_address(option: str | None) -> Address | None:
    """The cluster that --ray-address or RAY_ADDRESS names. None: neither names one, or the value is "local".

    A cluster that Ray finds by itself, in /tmp/ray/ray_current_cluster or among the processes of this machine, is used
    only for "auto": it may be another user's cluster or a dead one.

    Raises:
        CapacityError: "auto", and no cluster runs on this machine.
        ConfigError: an address of another kind.
    """
    text, source = option, "--ray-address"
    if not text:
        text, source = os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS"
    if not text or text == "local":
        return None
    if text == "auto":
        with _without_ray_address():
            try:
                found = services.canonicalize_bootstrap_address_or_die("auto")
            except ConnectionError as error:
                raise CapacityError(
                    f"{source}=auto, and Ray finds no cluster on this machine ({_first_line(error)}). Give host:port, "
                    "or leave it out: then a private Ray is started."
                ) from None
        return Address(found, f"found by Ray on this machine for {source}=auto")
    if "://" in text:
        raise ConfigError(
            f"{source}={text!r} is not the address of a cluster's control service (host:port, mostly port 6379). To "
            "send a job to a cluster from outside use `rlhf submit --address http://HOST:8265`."
        )
    return Address(text, source)


def connect(address: Address, *, wait_s: float) -> None:
    """Joins the cluster at `address`.

    Raises:
        CapacityError: it does not answer within `wait_s`.
        ConfigError: it refuses the token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address.is_private:
        _read_environment_again()
    _await_answer(address, wait_s)
    os.environ["RAY_ADDRESS"] = address.text
    # Ray would try twenty times, for 40 s each, although the service has just answered.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    try:
        with _own_sigterm():
            ray.init(address=address.text, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=None)
    except Exception as error:  # ray raises anything from ValueError to ConnectionError here
        raise _no_cluster(address, _first_line(error)) from error


def _read_environment_again() -> None:
    """Ray read its variables when it was imported, before a private Ray had a token."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    # Ray replaces loopback by the machine's outward address, unless it thinks that it is on an operating system
    # without clusters. The variable applies to processes that start later.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def disconnect() -> None:
    """Leaves the cluster. Does not wait for Ray's call, which takes a minute if the cluster is gone."""
    leaving = threading.Thread(target=ray.shutdown, name="leave-cluster", daemon=True)
    leaving.start()
    leaving.join(LEAVE_S)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray installs a handler that ends the process with code 15 and no message."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _without_ray_address() -> Iterator[None]:
    """Ray uses the variable instead of its own search."""
    before = os.environ.pop("RAY_ADDRESS", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


def _await_answer(address: Address, wait_s: float) -> None:
    """Waits until the control service at host:port answers: Ray would retry for minutes, with a warning each time."""
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return  # Ray checks certificates itself
    with grpc.insecure_channel(address.text, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=wait_s)
            asked = channel.unary_unary(_ASKED)
            asked(b"", timeout=wait_s, metadata=[(key.lower(), value) for key, value in _token().items()])
        except grpc.FutureTimeoutError:
            raise _no_cluster(address, f"waited {wait_s:g} s") from None
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise _refused(address) from None
            raise _no_cluster(address, f"what listens there answers Ray's {_ASKED} with {error.code().name}") from None


def _token() -> Mapping[str, str]:
    """Header with the token from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token; empty without one.

    Raises:
        ConfigError: RAY_AUTH_MODE=token, but there is no token.
    """
    try:
        return dict(get_auth_headers_if_auth_enabled({}))
    except (AuthenticationError, RuntimeError) as error:
        raise ConfigError(f"RAY_AUTH_MODE=token, and no token can be read: {_first_line(error)}") from None


def _refused(address: Address) -> ConfigError:
    return ConfigError(
        f"the cluster at {address} refuses this token, or the lack of one. Set RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN_PATH to the file with the cluster's token."
    )


def _no_cluster(address: Address, cause: str) -> CapacityError:
    return CapacityError(
        f"no Ray cluster answers at {address}: {cause}. Correct or unset the address (without one a private Ray is "
        "started), or start a cluster there with `ray start --head`."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def alive_nodes() -> list[Node]:
    """Nodes that accept work; not a head that was started with --num-cpus=0."""
    nodes = [
        Node(entry["NodeManagerAddress"], entry["Resources"].get("CPU", 0.0), entry["Resources"].get("GPU", 0.0))
        for entry in ray.nodes()
        if entry["Alive"]
    ]
    return sorted((node for node in nodes if node.cpus), key=lambda node: node.address)


async def plan_when_ready(demands: Sequence[Demand], *, mode: Any, wait_s: float, tell: Callable[[str], None]) -> Plan:
    """The placement plan. Waits up to `wait_s` for nodes to join, and reports the wait.

    Raises:
        CapacityError: says what is missing.
    """
    deadline = time.monotonic() + wait_s
    told = ""
    while True:
        try:
            return place(demands, alive_nodes(), mode=mode)
        except CapacityError as error:
            if time.monotonic() > deadline or _can_never_fit():
                raise
            short = str(error).splitlines()[0]
            if short != told:
                tell(f"waiting up to {wait_s:g} s (placement.wait_s) for nodes to join: {short}")
                told = short
            await asyncio.sleep(1.0)


def _can_never_fit() -> bool:
    """A cluster on loopback consists of one machine and never grows."""
    return bool(ray.get_runtime_context().gcs_address.startswith("127."))


async def reserve(plan: Plan, *, wait_s: float, tell: Callable[[str], None]) -> PlacementGroup:
    """Reserves all slots of a plan together. Raises CapacityError if they are not free within `wait_s`."""
    group = placement_group([bundle.resources for bundle in bundles(plan)], strategy="PACK")
    granted = False
    try:
        granted = await _granted(group, min(wait_s, QUIET_WAIT_S))
        if not granted:
            tell(f"waiting up to {wait_s:g} s (placement.wait_s) for other jobs to free what is planned")
            granted = await _granted(group, wait_s - QUIET_WAIT_S)
    finally:
        if not granted:
            remove_placement_group(group)
    if not granted:
        raise CapacityError(
            f"the cluster did not free the planned resources within placement.wait_s={wait_s:g} s; other jobs hold "
            f"them (`ray status` shows which). The plan was:\n{plan.describe()}"
        )
    return group


async def _granted(group: PlacementGroup, wait_s: float) -> bool:
    """Waits in short intervals, because a thread can't be cancelled and the program waits for its threads."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if await asyncio.to_thread(group.wait, 1):
            return True
    return False


@dataclass(frozen=True)
class Bundle:
    """A part of a reservation, on one node.

    Args:
        gpus: numbers of the plan's GPUs that it holds.
        slots: the actors in it.
    """

    resources: dict[str, float]
    gpus: Sequence[int]
    slots: Sequence[Slot]


def bundles(plan: Plan) -> list[Bundle]:
    """One per node with all GPUs of the plan there, whole, and the actors on them; and one per actor without a GPU."""
    found = []
    for address in dict.fromkeys(plan.gpus):
        slots = [slot for slot in plan.slots if slot.gpus and slot.address == address]
        numbers = [number for number, at in enumerate(plan.gpus) if at == address]
        found.append(Bundle({**_bundle(address, slots), "GPU": float(len(numbers))}, numbers, slots))
    return found + [Bundle(_bundle(slot.address, [slot]), (), [slot]) for slot in plan.slots if not slot.gpus]


def requested_cpus(slot: Slot) -> float:
    """What an actor asks of its bundle. Ray counts in ten-thousandths: rounded shares of several actors could add up to
    more than their rounded sum, and the last one would wait for ever."""
    return max(slot.cpu_share - 2 * _RAY_UNIT, 0.0) if slot.gpus else slot.cpu_share


def _bundle(address: str, slots: Sequence[Slot]) -> dict[str, float]:
    return {f"node:{address}": 0.001, "CPU": sum(slot.cpu_share for slot in slots)}


def network_settings() -> dict[str, str]:
    """The variables by which NCCL and gloo are set up, such as NCCL_SOCKET_IFNAME and NCCL_DEBUG. Those of the driver
    reach all actors; others keep those of their node."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(NETWORK)}


def environment(threads: int, *, on_gpu: bool) -> dict[str, str]:
    """Environment of an actor process: its thread count, its allocator, the network, and no usage reports."""
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | network_settings()
    variables |= {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not on_gpu:
        variables |= SPINS | KERNEL_CACHES | allocator.variables()
    return variables
