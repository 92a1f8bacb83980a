"""The numbers of devices over which vLLM can divide one engine (tensor parallelism): a pure function of sizes.

Before it loads a model vLLM checks only the attention heads (config/model.py, verify_with_parallel_config); the rest
fails in its layers (vLLM 0.32): key-value heads in model_executor/layers/linear.py, QKVParallelLinear; MLPs there, in
ColumnParallelLinear and RowParallelLinear, and experts in layers/fused_moe/config.py; embeddings and the head in
layers/vocab_parallel_embedding.py. tests/contract/test_widths.py compares this rule with these layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

VOCABULARY_BLOCK = 64  # vLLM pads vocabularies to a multiple of this
_MOST = 64


@dataclass(frozen=True)
class Divided:
    """What the workers of an engine divide among themselves.

    Args:
        kv_heads: a width above them gives several workers a copy of one. None: all workers have the same (MLA).
        inner: widths of MLPs and experts by their key in the model's config.
    """

    heads: int
    kv_heads: int | None
    inner: tuple[tuple[str, int], ...]
    vocabulary: int

    def misfits(self, width: int) -> Iterator[str]:
        """What can't be divided over `width` workers, with its number."""
        if self.heads % width:
            yield f"{self.heads} attention heads"
        if self.kv_heads is not None and max(self.kv_heads, width) % min(self.kv_heads, width):
            yield f"{self.kv_heads} key-value heads (nor are they a divisor of it)"
        yield from (f"{name}={size}" for name, size in self.inner if size % width)
        padded = -(-self.vocabulary // VOCABULARY_BLOCK) * VOCABULARY_BLOCK
        if padded % width:
            yield f"{padded} rows of the embedding (a vocabulary of {self.vocabulary}, padded)"

    def divides(self, width: int) -> bool:
        return not any(self.misfits(width))

    @property
    def widths(self) -> Sequence[int]:
        """Those that work."""
        return [width for width in range(1, min(self.heads, _MOST) + 1) if self.divides(width)]
