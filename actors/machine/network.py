"""The network interface by which another host is reached."""

from __future__ import annotations

import socket

import psutil


def interface_towards(address: str) -> str | None:
    """The network interface that leads to `address`.

    Gloo would use the one that this host's name resolves to. On many images that is loopback, which no other host
    can reach.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 1))  # sends nothing
        except OSError:
            return None  # e.g. an IPv6 network: the libraries choose
        own = probe.getsockname()[0]
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, entries in interfaces if any(entry.address == own for entry in entries)), None)
