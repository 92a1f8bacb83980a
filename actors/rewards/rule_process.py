"""The process that runs rules and environments. It is run by path and needs only the standard library, so it starts in
milliseconds.

It forks into two processes. The worker imports and calls the user's functions. The keeper kills the worker and all its
descendants when the caller closes the keeper's standard input or ends, or when a limit is exceeded; it then prints the
reason to standard output. Output of rules goes to standard error.

Arguments: file descriptors of requests and answers, memory limit in bytes (0: none), limit of processes.
Requests are pickles with an 8-byte length prefix; answers are lines of JSON. The first request holds the import path
and either the rules' names or a module that serves all further requests, see Channel.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import mmap
import numbers
import os
import pickle
import reprlib
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("<Q")
_POSITION = struct.Struct("<qq")  # current sample and rule, in memory that both processes share
_TICK_MS = 25
_NICER = 10  # lets the keeper run even if a rule has started many processes
END_S = 60.0  # without a PID namespace, thousands of processes are killed one by one
_LONGEST_TEXT = 300
_MOST_PARTS = 100
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_CLONE_NEWNS, _CLONE_NEWPID = 0x20000, 0x20000000
_MS_REC, _MS_SLAVE = 1 << 14, 1 << 19

Rule = Callable[[str, str, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Channel:
    """What a server in the worker uses; `serve(hello, channel)` is the function of its module.

    Args:
        read: the next request. Ends the process when there is none.
        answer: sends one answer.
        at: records the position, in its request, of the call that runs, for the message if the process ends.
        load: the callable named `package.module:name`, or an error text; the second argument says what is expected.
        described: the text of an exception.
        numbers: (the finite numbers that a call returned, by part, or an error text)
    """

    read: Callable[[], Any]
    answer: Callable[[Any], None]
    at: Callable[[int], None]
    load: Callable[[str, str], Any]
    described: Callable[[BaseException], str]
    numbers: Callable[[str, Any], tuple[dict[str, float], str]]


def finite_number(value: object) -> float | None:
    """`value` as a float. None: it is not a number (nor are booleans), or not finite as a 64-bit float."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Decimal)):
        return None
    try:
        number = float(value)
    except (ArithmeticError, ValueError, TypeError):
        return None
    return number if math.isfinite(number) else None


def main() -> None:
    requests, answers, memory_bytes, processes = map(int, sys.argv[1:])
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    position = mmap.mmap(-1, _POSITION.size)
    init = _begin_namespace()
    child = os.fork()
    if child == 0:
        try:
            _become_worker(memory_bytes, shows_processes=init is not None)
            _serve(requests, answers, position)
        except BaseException:  # noqa: BLE001  the forked child must not return to the caller
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(requests)
    os.close(answers)
    reason = _watch(child, init, memory_bytes, processes)
    _end_all(child, init)
    sample, rule = _POSITION.unpack(position)
    os.write(1, json.dumps({"reason": reason, "sample": sample, "rule": rule}).encode())


# The keeper.


def _begin_namespace() -> int | None:
    """Puts all later children into a new PID namespace and returns its init process. Killing init makes the kernel end
    all of them at once. None: CAP_SYS_ADMIN is missing, or the system has no PID namespaces.

    Rules can't signal processes outside the namespace.
    """
    if sys.platform != "linux" or ctypes.CDLL(None).unshare(_CLONE_NEWPID):
        return None
    init = os.fork()
    if init:
        return init
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.closerange(0, os.sysconf("SC_OPEN_MAX"))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reaps orphans, which become children of this process
    while True:
        signal.pause()


def _watch(child: int, init: int | None, memory_bytes: int, processes: int) -> str:
    """Waits for a reason to end the worker, and returns it."""
    poller = select.poll()
    poller.register(0, select.POLLIN)
    if hasattr(os, "pidfd_open"):
        poller.register(os.pidfd_open(child), select.POLLIN)
    while True:
        events = poller.poll(_TICK_MS)
        status = _reap(child)
        if status is not None:
            code = os.waitstatus_to_exitcode(status)
            return f"ended its process with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        if any(descriptor == 0 for descriptor, _ in events):
            return "closed the connection of its process"
        family = [pid for pid in _family() if pid != init]
        if len(family) > processes:
            return f"had {len(family)} processes, more than rule_limits.processes={processes}"
        held = _held_bytes(family, memory_bytes)
        if memory_bytes and held > memory_bytes:
            return f"held {held / (1 << 30):.1f} GiB, more than rule_limits.memory_gib={memory_bytes / (1 << 30):g}"


def _reap(child: int) -> int | None:
    """Reaps processes that ended. Returns the wait status of `child` if it is among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return found
            found = status if pid == child else found
    return found


def _end_all(worker: int, init: int | None) -> None:
    """Kills all descendants. Orphans become children of this process or of `init`, so none is missed.

    Whole process groups are killed in one call, during which their members can't fork: processes that fork
    continuously may multiply faster than they can be killed one by one.
    """
    until = time.monotonic() + END_S
    if init is not None:
        with contextlib.suppress(OSError):
            os.kill(init, signal.SIGKILL)
    _kill_group(worker)
    while (family := _family()) and time.monotonic() < until:
        for group in {_group_of(pid) for pid in family} - {os.getpgrp()}:
            _kill_group(group)
        for pid in family:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
        _reap(0)


def _kill_group(group: int) -> None:
    if group > 1:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


def _group_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return os.getpgid(pid)
    return 0


def _family() -> list[int]:
    """Descendants of this process."""
    if sys.platform != "linux":
        return _family_by_ps()
    found = list(_children(os.getpid()))
    for pid in found:  # grows during the iteration
        found.extend(_children(pid))
    return found


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                yield from map(int, Path(f"/proc/{pid}/task/{task}/children").read_bytes().split())


def _family_by_ps() -> list[int]:
    listed = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, check=False, timeout=END_S)
    pairs = [line.split() for line in listed.stdout.splitlines()]
    found = [os.getpid()]
    for parent in found:
        found.extend(int(pid) for pid, of in pairs if int(of) == parent)
    return found[1:]


def _held_bytes(family: Sequence[int], limit: int) -> int:
    """Resident memory of these processes. Pages that forked processes share count once."""
    held = sum(_resident_bytes(pid) for pid in family)
    return held if held <= limit or len(family) < 2 else sum(_proportional_bytes(pid) for pid in family)


def _resident_bytes(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * mmap.PAGESIZE
    return 0


def _proportional_bytes(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_bytes().splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) << 10
    return 0


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


# The worker.


def _become_worker(memory_bytes: int, *, shows_processes: bool) -> None:
    """Args:
    shows_processes: mount the PID namespace's /proc, which has different process ids.
    """
    libc = ctypes.CDLL(None)
    is_apart = shows_processes and not libc.unshare(_CLONE_NEWNS)
    if is_apart and not libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None):  # hides the mount from other processes
        libc.mount(b"proc", b"/proc", b"proc", 0, None)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    os.nice(_NICER)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))


def _serve(requests: int, answers: int, position: mmap.mmap) -> None:
    """Answers requests until the input ends: first the rules' names, then batches of samples."""
    own = os.getpid()

    def answer(line: Any) -> None:
        if os.getpid() != own:
            os._exit(0)  # a rule forked, and its child returned here
        data = json.dumps(line).encode() + b"\n"
        while data:
            data = data[os.write(answers, data) :]

    def at(place: int) -> None:
        _POSITION.pack_into(position, 0, place, 0)

    stream = os.fdopen(requests, "rb")
    hello = _read(stream)
    sys.path[:], sys.argv = hello["path"], [""]
    _POSITION.pack_into(position, 0, -1, -1)
    if "server" in hello:
        channel = Channel(partial(_read, stream), answer, at, _loaded, _described, _named_numbers)
        importlib.import_module(hello["server"]).serve(hello, channel)
        return
    rules: list[tuple[str, Rule, float]] = []
    for index, (name, function, weight) in enumerate(hello["rules"]):
        _POSITION.pack_into(position, 0, -1, index)
        rule = _loaded(function, "a function of (prompt, response, meta)")
        if isinstance(rule, str):
            answer({"problem": f"{function!r}: {rule}"})
            return
        rules.append((name, rule, weight))
    answer({"problem": None})
    while True:
        for index, sample in enumerate(_read(stream)):
            answer(_scored(rules, sample, partial(_POSITION.pack_into, position, 0, index)))


def _read(stream: Any) -> Any:
    """Reads the next request. Exits at the end of input: the caller has ended."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        os._exit(0)
    return pickle.loads(stream.read(*LENGTH.unpack(head)))  # trusted: written by the caller


def _loaded(name: str, expected: str) -> Rule | str:
    """What is named `package.module:name`, or an error text."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
        rule = getattr(module, attribute, None)
    except BaseException as error:  # noqa: BLE001  a rule's module is the user's code and may raise anything
        return (
            f"module {module_name!r} can't be imported ({_described(error)}). Check its name, and that it is installed "
            "(or in the working directory) on every node."
        )
    if rule is None:
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        return f"{module_name!r} has no {attribute!r}; it has: {known[:_LONGEST_TEXT] or 'no functions'}."
    if not callable(rule):
        return f"it is a {type(rule).__name__}, not {expected}."
    known_rule: Rule = rule
    return known_rule


def _scored(rules: Sequence[tuple[str, Rule, float]], sample: Sequence[str], at: Callable[[int], None]) -> Any:
    """[weighted sum, raw parts], or an error text that names the failed rule."""
    prompt, response, meta_text = sample
    meta = json.loads(meta_text)
    total, parts = 0.0, dict[str, float]()
    for index, (name, rule, weight) in enumerate(rules):
        at(index)
        try:
            named, problem = _named_numbers(name, rule(prompt, response, meta))
        except BaseException as error:  # noqa: BLE001  a rule is the user's code and may raise anything, SystemExit too
            named, problem = {}, _described(error)
        if problem:
            return f"rule {name}: {problem}"
        parts |= named
        total += weight * sum(named.values())
    if not math.isfinite(total):
        return f"the weighted sum of {_shown(parts)} is not a finite number"
    return [total, parts]


def _named_numbers(name: str, result: Any) -> tuple[dict[str, float], str]:
    """(the numbers that a rule returned, by part, or an error text)"""
    named = {name: result}
    if isinstance(result, Mapping):
        if len(result) > _MOST_PARTS:
            return {}, f"returned {len(result)} parts; the limit is {_MOST_PARTS}"
        named = {f"{name}.{part}": value for part, value in result.items()}
        if len(named) != len(result) or any(len(part) > _LONGEST_TEXT for part in named):
            return {}, f"returned parts whose names are equal or longer than {_LONGEST_TEXT}: {_shown(result)}"
    converted = {part: finite_number(value) for part, value in named.items()}
    if not named or None in converted.values():
        return {}, f"returned {_shown(result)}, not a finite number or a mapping of finite numbers"
    return {part: value for part, value in converted.items() if value is not None}, ""


def _described(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"MemoryError: rule_limits.memory_gib is exhausted {_text(str, error)}".rstrip()
    return f"{type(error).__name__}: {_text(str, error)}"


def _shown(value: object) -> str:
    return _text(reprlib.repr, value)


def _text(show: Callable[[Any], str], value: object) -> str:
    try:
        return show(value)[:_LONGEST_TEXT]
    except BaseException:  # noqa: BLE001  str() or repr() of the user's class may raise anything
        return f"a {type(value).__name__}"


if __name__ == "__main__":
    main()
