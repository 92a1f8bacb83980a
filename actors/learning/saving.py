"""Parts of a learner's checkpoint: what is left out of it, how it is read without that, and full disks."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from orchestrator.errors import StorageError


def drop_frozen(model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Of a state that is saved. A frozen weight has several names if it is tied."""
    for name, parameter in model.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(name, None)


def load_learned(src: Mapping[str, Tensor], dst: nn.Module) -> None:
    """Loads a state without frozen weights.

    Raises:
        StorageError: it lacks something that learns, or holds something else.
    """
    found = dst.load_state_dict(src, strict=False)
    frozen = {name for name, tensor in dst.named_parameters(remove_duplicate=False) if not tensor.requires_grad}
    wrong = [*sorted(set(found.missing_keys) - frozen), *found.unexpected_keys]
    if wrong:
        raise StorageError(
            f"the checkpoint and the model have other adapters: {', '.join(wrong[:5])}. Continue with the model and "
            "lora.targets of the run."
        )


@contextlib.contextmanager
def full_disks(folder: Path) -> Iterator[None]:
    """Converts the RuntimeError that torch's archive writer raises on a full disk, which does not mention the disk."""
    try:
        yield
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        free = shutil.disk_usage(folder).free
        raise OSError(errno.ENOSPC, f"torch stopped writing, {free >> 20} MiB are free there", str(folder)) from error
