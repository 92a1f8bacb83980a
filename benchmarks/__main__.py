"""`python -m benchmarks [--gpu] [NAME ...]`: runs benchmarks in sequence, then shows all results in one table.

Each runs in a separate process; a failure is reported and the others continue. Exit codes: 0 all succeeded, 1 one
failed, 2 --gpu was given but there is no GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import table
from benchmarks.harness import version

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS: Mapping[str, Sequence[str]] = {
    "rollout": (),
    "learner": (),
    "lora": (),
    "scoring": (),
    "publish": (),
    "digest": (),
    "cold_start": (),
    "overhead": (),
    "simulate": ("--check",),
    "staleness": (),
    "trl_step": (),
    "coordinator_scale": (),
    "coordinator_memory": (),
    "reading": (),
    "labelling": (),
}
NEEDS_GPU = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--gpu", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"unknown benchmarks {', '.join(sorted(unknown))}; choose from {', '.join(BENCHMARKS)}")
    chosen: Mapping[str, Sequence[str]] = BENCHMARKS
    if arguments.gpu:
        if reason := why_no_gpu_here():
            sys.stderr.write(f"make bench-gpu needs a GPU that torch can use: {reason}\n")
            sys.exit(NEEDS_GPU)
        chosen = gpu_benchmarks()
    names = arguments.names or list(chosen)
    failed = [name for name in names if run(name, chosen.get(name, ()))]
    table.main()
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}; run one alone: python -m benchmarks.NAME\n")
    sys.exit(bool(failed))


def run(name: str, arguments: Sequence[str]) -> int:
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], cwd=ROOT, check=False).returncode


def why_no_gpu_here() -> str | None:
    """None: there is one. Asks another process, so that CUDA is not started in this one."""
    probe = "from actors.machine.devices import why_none_here; print(why_none_here() or '')"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or (done.stderr.strip() if done.returncode else None)


def gpu_benchmarks() -> Mapping[str, Sequence[str]]:
    """Benchmarks that compute on the GPU; rollouts use Hugging Face if vLLM's CUDA build is not installed."""
    engine = "vllm" if version("vllm") else "hf"
    return {"rollout": ("--engine", engine), "learner": ("--role", "policy"), "lora": (), "scoring": ()}


if __name__ == "__main__":
    main()
