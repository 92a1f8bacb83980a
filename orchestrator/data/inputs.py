"""Opens untrusted files: only regular files, and small files only up to a limit.

Reading a named pipe without a writer, a terminal or /dev/zero would never end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from orchestrator.errors import RlhfError

MAX_SETTINGS_BYTES = 2**20  # size of a config, a template, a list of settings
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def at_home(path: str | Path, what: str, error: type[RlhfError]) -> Path:
    """`path` with ~ replaced by the home folder. Raises `error` if this user has none, as in many containers."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise error(
            f"{what}={str(path)!r} is below the home folder, and this user has none. Set HOME to a writable folder, or "
            f"{what} to an absolute path."
        ) from None


def size_of_file(path: str | Path, what: str, error: type[RlhfError]) -> int:
    """Size of a regular file in bytes; follows links.

    Args:
        what: name of the file in messages, such as "config file x.yaml".
        error: raised if the file is missing or not regular.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise error(f"{what} is a link to {os.readlink(path)}, which does not exist: correct the link.") from None
        raise error(f"{what} does not exist: check the path (relative paths start at the working folder).") from None
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise error(f"{what} can't be read ({reason}): check the path.") from None
    if not stat.S_ISREG(found.st_mode):
        kind = next((words for test, words in _KINDS if test(found.st_mode)), "not a file")
        raise error(f"{what} can't be read: it is {kind}. Give a regular file.")
    return found.st_size


def read_text(path: Path, what: str, error: type[RlhfError], *, max_bytes: int = MAX_SETTINGS_BYTES) -> str:
    """Reads a small regular file. Raises `error` if it is not regular, too long or not UTF-8."""
    size_of_file(path, what, error)
    try:
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
        text = data.decode("utf-8")
    except OSError as problem:
        raise error(f"{what} can't be read ({problem.strerror}): check the path.") from None
    except UnicodeDecodeError:
        raise error(f"{what} is not UTF-8 text: convert it, or give another file.") from None
    if len(data) > max_bytes:
        raise error(f"{what} is longer than {max_bytes >> 10} KiB: is it the right file?")
    return text
