"""Which cluster a command uses, and how fast it reports that there is none."""

from __future__ import annotations

import os
import signal
from time import monotonic

import pytest
import ray

from actors.groups import cluster
from actors.groups.cluster import NETWORK, Address, connect, environment, named_address, network_settings
from orchestrator.errors import CapacityError, ConfigError
from tests.deadlines import scaled
from tests.ports import free_port


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_without_an_address_no_cluster_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*_: object, **__: object) -> str:
        raise AssertionError("looked for somebody's cluster")

    monkeypatch.setattr(cluster.services, "canonicalize_bootstrap_address_or_die", search)
    monkeypatch.setattr(cluster.services, "find_bootstrap_address", search)
    assert named_address(None) is None
    for nothing in ("", "local"):
        monkeypatch.setenv("RAY_ADDRESS", nothing)
        assert named_address(None) is None


def test_an_address_carries_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert named_address(None) == Address("10.0.0.1:6379", "RAY_ADDRESS")
    assert named_address("10.0.0.2:6379") == Address("10.0.0.2:6379", "--ray-address")


@pytest.mark.parametrize("option", [None, "auto"])
def test_auto_asks_ray_and_says_so(monkeypatch: pytest.MonkeyPatch, option: str | None) -> None:
    source = "--ray-address" if option else "RAY_ADDRESS"
    if not option:
        monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(cluster.services, "find_gcs_addresses", set)
    monkeypatch.setattr(cluster.services, "find_bootstrap_address", lambda _: "10.0.0.3:6379")
    monkeypatch.setattr(cluster.services, "canonicalize_bootstrap_address_or_die", lambda _: "10.0.0.3:6379")
    assert str(named_address(option)) == f"10.0.0.3:6379 (found by Ray on this machine for {source}=auto)"

    def none(_: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(cluster.services, "canonicalize_bootstrap_address_or_die", none)
    with pytest.raises(CapacityError, match=f"{source}=auto, and Ray finds no cluster on this machine"):
        named_address(option)


@pytest.mark.parametrize("text", ["http://10.0.0.1:8265", "ray://10.0.0.1:10001"])
def test_an_address_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="rlhf submit"):
        named_address(text)


def test_a_dead_address_is_told_at_its_deadline_with_its_source() -> None:
    address = Address(f"127.0.0.1:{free_port()}", "RAY_ADDRESS")
    started = monotonic()
    with pytest.raises(CapacityError, match=rf"answers at {address.text} \(RAY_ADDRESS\): waited 1 s"):
        connect(address, wait_s=1.0)
    assert monotonic() - started < scaled(20)


def test_rays_handler_of_sigterm_does_not_end_the_process_with_code_15(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: exit(number))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "_await_answer", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        connect(Address("127.0.0.1:1", "RAY_ADDRESS"), wait_s=1.0)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("on_gpu", [False, True])
def test_settings_of_the_network_reach_the_actors(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    settings = {
        "NCCL_SOCKET_IFNAME": "ib0",
        "NCCL_DEBUG": "INFO",
        "TORCH_NCCL_BLOCKING_WAIT": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    for name in [name for name in os.environ if name.startswith(NETWORK)]:
        monkeypatch.delenv(name)
    assert network_settings() == {}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MY_NCCL_NOTES", "not for actors")
    assert network_settings() == settings
    found = environment(2, on_gpu=on_gpu)
    assert settings.items() <= found.items()
    assert "MY_NCCL_NOTES" not in found
