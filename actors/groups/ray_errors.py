"""Translates Ray's exceptions to RlhfErrors. A restart helps only after infrastructure errors.

The table lists all classes of ray.exceptions; a test compares.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray import exceptions
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from orchestrator.errors import (
    ConfigError,
    DeadlineExceeded,
    ObjectGone,
    PeerLost,
    RlhfError,
    RoleDied,
    RoleError,
    RoleLost,
)

# Errors of a rank whose peer died during a collective, often before Ray detects the death: gloo raises a
# bare RuntimeError that names its source file, NCCL and rendezvous raise torch's own classes.
_COLLECTIVE_FAILED = ("/gloo/transport/", "DistBackendError: ", "DistNetworkError: ", "DistStoreError: ")

CLASSES: Mapping[type[Exception], type[RlhfError]] = {
    # Infrastructure: the actor's process is gone.
    exceptions.RayActorError: RoleDied,
    exceptions.ActorDiedError: RoleDied,
    exceptions.ActorUnavailableError: RoleDied,
    exceptions.WorkerCrashedError: RoleDied,
    exceptions.OutOfMemoryError: RoleDied,
    exceptions.NodeDiedError: RoleDied,
    exceptions.LocalRayletDiedError: RoleDied,
    exceptions.ActorPlacementGroupRemoved: RoleDied,
    exceptions.TaskPlacementGroupRemoved: RoleDied,
    exceptions.ActorUnschedulableError: RoleDied,
    exceptions.TaskUnschedulableError: RoleDied,
    # Infrastructure: Ray itself, a disk or a connection failed.
    exceptions.OutOfDiskError: RoleLost,
    exceptions.ObjectStoreFullError: RoleLost,
    exceptions.PlasmaObjectNotAvailable: RoleLost,
    exceptions.RpcError: RoleLost,
    exceptions.RaySystemError: RoleLost,
    exceptions.RayChannelError: RoleLost,
    exceptions.RayDirectTransportError: RoleLost,
    exceptions.RuntimeEnvSetupError: RoleLost,
    exceptions.GetTimeoutError: DeadlineExceeded,
    exceptions.RayChannelTimeoutError: DeadlineExceeded,
    # Infrastructure: an object was lost with its node or its owner.
    exceptions.ObjectLostError: ObjectGone,
    exceptions.ObjectFetchTimedOutError: ObjectGone,
    exceptions.OwnerDiedError: ObjectGone,
    exceptions.ObjectReconstructionFailedError: ObjectGone,
    exceptions.ReferenceCountingAssertionError: ObjectGone,
    # Shutdown: the call or the actor was ended externally, e.g. from the dashboard.
    exceptions.TaskCancelledError: RoleLost,
    exceptions.AsyncioActorExit: RoleDied,
    # The cluster refuses the token: a restart does not help.
    exceptions.AuthenticationError: ConfigError,
    # Programming, or data if the cause is an RlhfError.
    exceptions.RayError: RoleError,
    exceptions.RayTaskError: RoleError,
    exceptions.UserCodeException: RoleError,
    exceptions.CrossLanguageError: RoleError,
    exceptions.UnserializableException: RoleError,
    exceptions.OufOfBandObjectRefSerializationException: RoleError,
    exceptions.ObjectFreedError: RoleError,
    exceptions.ObjectRefStreamEndOfStreamError: RoleError,
    exceptions.StreamingGeneratorReplayInconsistentError: RoleError,
    exceptions.PendingCallsLimitExceeded: RoleError,
    exceptions.RayCgraphCapacityExceeded: RoleError,
    exceptions.ActorAlreadyExistsError: RoleError,
    exceptions.ActorHandleNotFoundError: RoleError,
}


def translated(error: RayError, role: str, rank: int, operation: str) -> Exception:
    """The RlhfError of a worker, or one that names the call and quotes Ray."""
    if isinstance(error, RayTaskError):
        return worker_error(error.cause, role, rank, operation)
    if isinstance(error, ActorDiedError) and error.args and isinstance(error.args[0], RayTaskError):
        # Ray keeps a constructor's error as the only argument.
        return worker_error(error.args[0].cause, role, rank, "start")
    return _of_class(class_of(error), error, role, rank, operation)


def class_of(error: Exception) -> type[RlhfError]:
    """By the nearest of the error's classes in the table. A class of a newer Ray counts as its parent."""
    return next((CLASSES[kind] for kind in type(error).__mro__ if kind in CLASSES), RoleError)


def first_lines(error: BaseException | None) -> str:
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:3]) if lines else type(error).__name__


def worker_error(cause: Exception, role: str, rank: int, operation: str) -> RlhfError:
    """The error of an actor's code as an RlhfError; PeerLost if a collective failed."""
    if isinstance(cause, RlhfError):
        return cause
    if isinstance(cause, RayTaskError):
        return worker_error(cause.cause, role, rank, operation)
    if isinstance(cause, RayError):
        found = class_of(cause)  # another actor that this one waited for; this process is alive
        return _of_class(RoleLost if found is RoleDied else found, cause, role, rank, operation)
    text = f"{type(cause).__name__}: {first_lines(cause)}"
    is_collective = any(sign in text for sign in _COLLECTIVE_FAILED)
    return (PeerLost if is_collective else RoleError)(role, rank, operation, text)


def _of_class(kind: type[RlhfError], error: Exception, role: str, rank: int, operation: str) -> RlhfError:
    text = f"{type(error).__name__}: {first_lines(error)}"
    if issubclass(kind, RoleError):
        return kind(role, rank, operation, text)
    return kind(
        f"Ray refuses {operation!r} of {role} rank {rank}: {text}. Check RAY_AUTH_MODE and the token that "
        "RAY_AUTH_TOKEN_PATH names."
    )
