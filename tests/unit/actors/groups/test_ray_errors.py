"""Every exception of Ray becomes an RlhfError and counts against the right budget."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator

import pytest
from ray import exceptions
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from actors.groups.ray_errors import CLASSES, class_of, translated
from orchestrator.errors import ConfigError, DataError, DeadlineExceeded, ObjectGone, PeerLost, RoleDied, RoleError
from orchestrator.failures import category_of


def all_of(root: type[Exception]) -> Iterator[type[Exception]]:
    yield root
    for kind in root.__subclasses__():
        # Ray Data is not used; whether it is loaded depends on other tests.
        if kind.__module__.startswith("ray.") and not kind.__module__.startswith("ray.data."):
            yield from all_of(kind)


KINDS = sorted(
    {
        *all_of(RayError),
        *(
            kind
            for _, kind in inspect.getmembers(exceptions, inspect.isclass)
            if issubclass(kind, Exception) and kind.__module__ == exceptions.__name__
        ),
    },
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_exception_of_ray_is_classified(kind: type[Exception]) -> None:
    assert kind in CLASSES, f"{kind.__name__} is new: add it to actors/groups/ray_errors.py"


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (exceptions.OutOfMemoryError("killed: the node had no memory"), "infrastructure"),
        (exceptions.NodeDiedError("gone"), "infrastructure"),
        (exceptions.WorkerCrashedError(), "infrastructure"),
        (exceptions.LocalRayletDiedError(), "infrastructure"),
        (exceptions.OutOfDiskError("full"), "infrastructure"),
        (exceptions.RaySystemError("broken"), "infrastructure"),
        (exceptions.ObjectLostError("0" * 56, None, ""), "infrastructure"),
        (exceptions.ActorUnavailableError("no connection", b"0" * 16), "infrastructure"),
        (exceptions.RayChannelTimeoutError("late"), "infrastructure"),
        (exceptions.ActorPlacementGroupRemoved(), "infrastructure"),
        (exceptions.TaskCancelledError(), "infrastructure"),
        (exceptions.PendingCallsLimitExceeded("too many"), "programming"),
        (exceptions.ObjectFreedError("0" * 56, None, ""), "programming"),
        (RayError("x"), "programming"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_which_budget_an_exception_of_ray_counts_against(error: RayError, category: str) -> None:
    found = translated(error, "critic", 1, "learn")
    assert isinstance(found, RoleError)
    assert category_of(found) == category
    assert (found.role, found.rank, found.operation) == ("critic", 1, "learn")
    assert type(error).__name__ in str(found)


def test_a_class_of_a_newer_ray_counts_as_its_parent() -> None:
    class NewerError(exceptions.ActorUnavailableError):
        pass

    assert class_of(NewerError("x", b"0" * 16)) is RoleDied


def raised(cause: Exception) -> RayTaskError:
    error = RayTaskError("learn", "Traceback ...", cause)
    return error.as_instanceof_cause() if not isinstance(cause, RayError) else error


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (DataError("bad row"), DataError),
        (TimeoutError("of its own"), RoleError),
        (exceptions.GetTimeoutError("a nested get"), DeadlineExceeded),
        (exceptions.OutOfMemoryError("a nested task"), RoleError),
        (exceptions.ObjectLostError("0" * 56, "", ""), ObjectGone),
        (RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:1] closed"), PeerLost),
        (MemoryError(), RoleError),
    ],
)
def test_what_a_worker_raised_counts_by_its_cause(cause: Exception, expected: type[Exception]) -> None:
    found = translated(raised(cause), "critic", 1, "learn")
    assert isinstance(found, expected)
    is_lost = isinstance(cause, RayError) or expected is PeerLost
    assert category_of(found) == ("data" if expected is DataError else "infrastructure" if is_lost else "programming")


def test_what_a_constructor_raised_is_named_as_the_start() -> None:
    died = ActorDiedError()
    died.args = (raised(ValueError("no such layer")),)
    found = translated(died, "critic", 1, "ready")
    assert isinstance(found, RoleError)
    assert found.operation == "start"
    assert category_of(found) == "programming"
    assert category_of(translated(ActorDiedError(), "critic", 1, "ready")) == "infrastructure"


def test_a_refused_token_ends_the_run_with_the_way_out() -> None:
    found = translated(exceptions.AuthenticationError("wrong token"), "critic", 1, "learn")
    assert isinstance(found, ConfigError)
    assert "RAY_AUTH_TOKEN_PATH" in str(found)


def test_our_errors_survive_pickling() -> None:
    found = translated(exceptions.OutOfMemoryError("killed"), "critic", 1, "learn")
    assert str(pickle.loads(pickle.dumps(found))) == str(found)
