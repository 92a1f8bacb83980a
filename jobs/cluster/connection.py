"""The cluster of a command: the one that is named, otherwise a private Ray on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from actors.groups.cluster import Address, connect, disconnect, named_address
from jobs.cluster.local_ray import local_ray


@contextmanager
def cluster(ray_address: str | None, *, wait_s: float, tell: Callable[[str], None]) -> Iterator[None]:
    """Joins the cluster that `ray_address` or RAY_ADDRESS names. Without either it starts a private Ray, which ends
    with the context; it never joins a Ray that another process started.

    Raises:
        CapacityError: the named cluster does not answer within `wait_s`, or no Ray can be started here.
        ConfigError: an address of another kind.
    """
    address = named_address(ray_address)
    if address is not None:
        connect(address, wait_s=wait_s)
        try:
            yield
        finally:
            disconnect()
        return
    tell("starting a private Ray on this machine (--ray-address or RAY_ADDRESS name a cluster) ...")
    with local_ray() as ray:
        os.environ |= ray.environment
        connect(Address(ray.address, "our own", is_private=True), wait_s=wait_s)
        try:
            yield
        finally:
            disconnect()
