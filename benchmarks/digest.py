"""`python -m benchmarks.digest [--rounds N]`: the linear digest of weights against a copy of them, and against XXH3.

The tensors are SmolLM2-135M's, in fp32 and bf16, one after another on all cores: read, or copied and read, as the
trainer's side of a publish does in one pass. XXH3 (128 bits, one thread) is the fastest checksum that we know; it does
not add over shards.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
import xxhash
from safetensors.torch import load_file

from actors.weights.digest import Digests, copied_part
from benchmarks.harness import Figure, Pairs, measure_turns, ratio_figure
from benchmarks.table import report
from benchmarks.work import load_work

TARGET = 1.5
Weights = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    weights = load_file(load_work("quickstart").folder / "model.safetensors")
    report(
        "digest", [figure for dtype in (torch.float32, torch.bfloat16) for figure in measure(weights, dtype, rounds)]
    )


def measure(weights: Weights, dtype: torch.dtype, rounds: int) -> list[Figure]:
    tensors = {name: tensor.to(dtype) for name, tensor in weights.items()}
    copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    def copy() -> None:
        for name, tensor in tensors.items():
            copies[name].copy_(tensor)

    def add() -> None:
        digests = Digests()
        for name, tensor in tensors.items():
            digests.add(name, tensor)
        digests.result()

    def copy_and_add() -> None:
        for name, tensor in tensors.items():
            copied_part(tensor.view(-1), copies[name].view(-1), name, tensor.shape, 0)

    def hash_bytes() -> None:
        for tensor in tensors.values():
            xxhash.xxh3_128_digest(tensor.view(torch.uint8).numpy().data)

    contenders: tuple[Callable[[], None], ...] = (add, copy_and_add, hash_bytes, copy)
    for run in contenders:
        run()
    digest_s, both_s, hash_s, copy_s = measure_turns([partial(_seconds, run) for run in contenders], rounds=rounds)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    what = f"{num_bytes / 1e6:.0f} MB in {len(tensors)} tensors"
    name = str(dtype).removeprefix("torch.")
    return [
        ratio_figure(
            f"digest ÷ copy, {name}", Pairs(digest_s, copy_s), "s", better="lower", target=TARGET, detail=what
        ),
        ratio_figure(f"digest ÷ XXH3, {name}", Pairs(digest_s, hash_s), "s", better="lower", detail=what),
        ratio_figure(f"copy with digest ÷ copy, {name}", Pairs(both_s, copy_s), "s", better="lower", detail=what),
    ]


def _seconds(run: Callable[[], None]) -> float:
    started = perf_counter()
    run()
    return perf_counter() - started


if __name__ == "__main__":
    main()
