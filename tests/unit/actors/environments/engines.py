"""An engine that samples what a script says. Obeys actors.engines.contract.Engine as far as it samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from actors.engines.contract import Sample, ordered_requests, rollout_table, summary
from actors.text.conversations import Chat
from orchestrator.types import SampleRequest, ShardRequest

Script = Callable[[SampleRequest], str]


class ScriptedEngine:
    """Args:
        script: the text of a reply; one that ends with "…" is cut by length.

    Attributes:
        asked: the requests of each call.
    """

    def __init__(self, chat: Chat, script: Script, *, max_length: int = 512) -> None:
        self._chat, self._script, self._max_length = chat, script, max_length
        self.asked: list[list[SampleRequest]] = []

    def generate(self, request: ShardRequest) -> tuple[pa.Table, dict[str, Any]]:
        requests = ordered_requests(request, self._max_length)
        self.asked.append(requests)
        samples = [self._sample(item) for item in requests]
        table = rollout_table(requests, samples, chat=self._chat, version=4)
        return table, summary(table, version=4, seconds=0.0)

    def version(self) -> int | None:
        return 4

    def _sample(self, item: SampleRequest) -> Sample:
        text = self._script(item)
        tokens = self._chat.tokens_of(text.removesuffix("…"))
        if not text.endswith("…"):
            tokens = np.concatenate([tokens, self._chat.closing])
        generator = np.random.default_rng(item.seed)
        return Sample(tokens.tolist(), (-generator.random(len(tokens))).tolist())
