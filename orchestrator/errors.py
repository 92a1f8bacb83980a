"""The tree of errors. The class determines the exit code of a job.

RlhfError                     exit  the message says what, where and the remedy
├── ConfigError                 2   a key, a value or a combination of values
├── DataError                   2   a file, a row, a tokenizer or a model folder
├── CapacityError               2   the cluster is too small, or does not answer
├── RoleError                   1   an actor failed; carries role, rank and operation
│   └── RoleLost                1   it can't answer, but not because of an error in its code
│       ├── RoleDied            1   its process is gone
│       ├── DeadlineExceeded    1   it did not answer in time
│       ├── PeerLost            1   another rank of its process group is gone
│       └── ObjectGone          1   an object that it needs was lost with a node
├── PublishError                1   an engine does not hold the published weights
├── StorageError                1   the log or a checkpoint can't be written or trusted
├── RewardError                 1   more rewards failed than are allowed
├── NonFiniteError              1   loss, gradient or reward is NaN or infinite
├── Superseded                  1   a newer attempt is writing this run
└── GuardTripped                3   a guard stopped the run
"""

from __future__ import annotations


class RlhfError(Exception):
    """Base of all errors that this program raises deliberately."""

    exit_code = 1


class ConfigError(RlhfError):
    exit_code = 2


class DataError(RlhfError):
    exit_code = 2


class CapacityError(RlhfError):
    exit_code = 2


class RoleError(RlhfError):
    """An actor failed.

    Args:
        role: role of the actor, e.g. "critic".
        rank: rank or replica number in the role's group.
        operation: the operation that failed.
        cause: the reason, in one line.
    """

    def __init__(self, role: str, rank: int, operation: str, cause: str) -> None:
        super().__init__(f"{role} rank {rank} failed in {operation!r}: {cause}")
        self.role, self.rank, self.operation, self.cause = role, rank, operation, cause

    def __reduce__(self) -> tuple[type[RoleError], tuple[str, int, str, str]]:
        return type(self), (self.role, self.rank, self.operation, self.cause)


class RoleLost(RoleError):
    pass


class RoleDied(RoleLost):
    pass


class DeadlineExceeded(RoleLost):
    pass


class PeerLost(RoleLost):
    pass


class ObjectGone(RoleLost):
    pass


class PublishError(RlhfError):
    pass


class StorageError(RlhfError):
    pass


class RewardError(RlhfError):
    pass


class NonFiniteError(RlhfError):
    pass


class Superseded(RlhfError):
    pass


class GuardTripped(RlhfError):
    exit_code = 3
