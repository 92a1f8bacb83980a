"""The error of a transport."""

from orchestrator.errors import RlhfError


class TransportBroken(RlhfError):
    """Buckets can't be carried this way at present: a peer is gone, stopped or unreachable. No weights are wrong; the
    publish starts again, over another transport if all processes are alive."""
