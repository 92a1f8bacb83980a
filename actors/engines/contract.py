"""Rollout engines: their contract and common parts.

actors/engines/vllm_engine.py   VllmEngine, the default
actors/engines/hf_engine.py     HfEngine, for architectures that vLLM does not support
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from actors.text.conversations import Chat
from actors.weights.manifest import WeightHeader
from actors.weights.transports.group import Rendezvous
from actors.weights.transports.receiver import Parcel
from orchestrator import schema
from orchestrator.config.environments import EnvironmentConfig
from orchestrator.config.publishing import PublishConfig
from orchestrator.config.rewards import RuleLimits
from orchestrator.config.sections import ModelConfig, RolloutConfig
from orchestrator.errors import DataError, PublishError
from orchestrator.roles import Tag
from orchestrator.types import SampleRequest, ShardRequest

RAW_RESPONSE = "raw_response"  # key of `meta`


@dataclass(frozen=True)
class UpdateReport:
    """One engine's report that it serves `version`.

    Args:
        num_tensors: received tensors, whose digests equal the trainer's.
        num_compared: tensors read back from the layers and found equal; 0 with verify = "checksums".
        seconds: time in the engine: receive, apply, verify.
    """

    version: int
    num_tensors: int
    num_bytes: int
    num_compared: int
    seconds: Mapping[str, float]


class Engine(Protocol):
    """One engine that samples. Not thread-safe; one call at a time.

    A publish is `begin_update`, `receive_bucket` once per bucket in order, `finish_update`. The engine does not serve
    from the start of a publish until its successful end; after a failure it does not serve until another publish
    succeeds. `join` comes before a publish whose buckets are broadcast.
    """

    def generate(self, request: ShardRequest) -> tuple[pa.Table, dict[str, Any]]:
        """Samples one shard: a table of schema.ROLLOUT in the order of `row`, and the numbers of a RolloutShard
        (num_samples, num_prompt_tokens, num_response_tokens, version, seconds).

        The samples depend on the set of requests and on their seeds, not on their order, nor on earlier calls.

        Raises:
            PublishError: the engine has no published version.
            DataError: a prompt leaves no room for max_new_tokens.
        """

    def prompt_logprobs(self, token_lists: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs, at temperature 1, of all given tokens except the first of each list."""

    def begin_update(self, header: WeightHeader) -> None:
        """Stops serving and prepares for the header's buckets. Raises PublishError on unknown or missing tensors."""

    def device_ids(self) -> list[str]:
        """The device of each of the engine's workers, see transports.shared.device_id."""

    def join(self, meeting: Rendezvous, first_rank: int) -> None:
        """The engine's workers join the group that broadcasts buckets, from this rank on. Raises TransportBroken."""

    def receive_bucket(self, parcel: Parcel) -> None:
        """Applies the tensors that end in this bucket. Raises PublishError, which names altered tensors, and
        TransportBroken."""

    def finish_update(self, version: int) -> UpdateReport:
        """Drops caches of older weights, verifies, and then serves `version`.

        Raises:
            PublishError: names tensors that the engine does not use.
        """

    def version(self) -> int | None:
        """The served version. None: the engine does not serve."""

    def sleep(self, level: int) -> None:
        """Frees GPU memory; may be repeated. 1: weights are kept on the host; 2: they are lost, and the engine does not
        serve until its next update. Only engines with `context.sleeps` ever sleep; without a version they start
        asleep."""

    def wake(self, tags: Sequence[Tag]) -> None:
        """Brings back what sleeps: "weights" before an update, "kv_cache" before sampling."""


@dataclass(frozen=True, kw_only=True)
class EngineContext:
    """Inputs of an engine in addition to its model's folder.

    Args:
        template: text of model.chat_template; None: the tokenizer's own.
        publish: verification of publishes, see actors.weights.verify.Verifier.
        threads: CPU threads of the engine.
        max_samples: maximum number of concurrent samples.
        version: version of the weights in the model's folder; None: serve only after the first publish.
        sleeps: whether the engine frees its GPU memory while others compute.
        environment: what the samples are conversations with, if it has a name.
        limits: of the environment's process.
        environment_s: time limit of a shard, after which the environment is not asked any more.
        episode_tokens: most tokens of all segments of an episode, with padding; None: not limited.
    """

    model: ModelConfig
    threads: int
    max_samples: int
    template: str | None = None
    rollout: RolloutConfig = RolloutConfig()  # noqa: RUF009  frozen
    publish: PublishConfig = PublishConfig()  # noqa: RUF009  frozen
    seed: int = 0
    version: int | None = 0
    sleeps: bool = False
    environment: EnvironmentConfig = EnvironmentConfig()  # noqa: RUF009  frozen
    limits: RuleLimits = RuleLimits()  # noqa: RUF009  frozen
    environment_s: float = 480.0
    episode_tokens: int | None = None


@dataclass
class ServedVersion:
    """The version that an engine serves: none from the start of an update until it is verified."""

    number: int | None
    reason: str = "it was started without a version"
    header: WeightHeader | None = field(default=None, repr=False)
    num_updates: int = 0

    def require(self) -> int:
        """Raises PublishError, which gives the reason, if there is none."""
        if self.number is None:
            raise PublishError(f"this engine serves no published version: {self.reason}. Publish before sampling.")
        return self.number

    def begin(self, header: WeightHeader | None) -> None:
        self.number, self.reason, self.header = None, "an update has started but not finished", header
        self.num_updates += 1

    def updating(self) -> WeightHeader:
        if self.header is None:
            raise PublishError(f"no update is in progress ({self.reason}); call begin_update first.")
        return self.header

    def discard(self) -> None:
        self.number, self.reason, self.header = None, "its weights were discarded while it slept", None

    def serve(self, version: int) -> None:
        self.number, self.header = version, None

    @contextmanager
    def failing(self) -> Iterator[None]:
        """If the body fails, takes the engine out of service and raises the error."""
        try:
            yield
        except BaseException as error:
            self.number, self.reason, self.header = None, f"its last update failed ({error})", None
            raise


@dataclass(frozen=True)
class Sample:
    """Response tokens, including a sampled end token, and their log-probs at the sampling temperature.

    Args:
        learn: whether the policy sampled the token; None: all of them.
        starts: where further segments begin.
        is_cut: the response is not finished, even if its last token ends a turn.
        meta: added to the prompt's.
        text: the reply, if it is not the text of the tokens.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    learn: Sequence[bool] | None = None
    starts: Sequence[int] = ()
    is_cut: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None


def ordered_requests(request: ShardRequest, max_length: int) -> list[SampleRequest]:
    """The shard's requests by row. Results depend on the content and order of a batch, so the order is fixed.

    Raises:
        DataError: names a prompt that leaves no room for max_new_tokens; engines would cut it silently.
    """
    limit = max_length - request.sampling.max_new_tokens
    for item in request.requests:
        if not 0 < len(item.prompt.tokens) <= limit:
            raise DataError(
                f"prompt {item.prompt.id!r} has {len(item.prompt.tokens)} tokens; 1 to {limit} fit beside "
                f"max_new_tokens={request.sampling.max_new_tokens} in a window of {max_length}. "
                "Lower prompts.max_prompt_tokens or rollout.max_new_tokens, or raise model.max_length."
            )
    return sorted(request.requests, key=lambda item: item.row)


def rollout_table(
    requests: Sequence[SampleRequest],
    samples: Sequence[Sample],
    *,
    chat: Chat,
    version: int,
) -> pa.Table:
    """Builds a table of schema.ROLLOUT from requests and their samples, in the same order.

    `response_text` is the reply without its end token; `meta["raw_response"]` is the complete reply.
    """
    raw = [chat.text(sample.tokens) for sample in samples]
    texts = [
        chat.text(chat.body(np.array(sample.tokens, np.int32))) if sample.text is None else sample.text
        for sample in samples
    ]
    metas = [
        {**item.prompt.meta, **sample.meta, RAW_RESPONSE: text}
        for item, sample, text in zip(requests, samples, raw, strict=True)
    ]
    columns: dict[str, Sequence[Any]] = {
        "row": [item.row for item in requests],
        "prompt_id": [item.prompt.id for item in requests],
        "sample_index": [item.sample_index for item in requests],
        "seed": [item.seed for item in requests],
        "prompt_text": [item.prompt.text for item in requests],
        "response_text": texts,
        "prompt_tokens": [item.prompt.tokens for item in requests],
        "response_tokens": [sample.tokens for sample in samples],
        "learn": [sample.learn or [True] * len(sample.tokens) for sample in samples],
        "starts": [sample.starts for sample in samples],
        "engine_logprobs": [sample.logprobs for sample in samples],
        "finish_reason": ["stop" if _is_finished(sample, chat) else "length" for sample in samples],
        "version": [version] * len(samples),
        "meta": [json.dumps(meta, ensure_ascii=False, sort_keys=True) for meta in metas],
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema.ROLLOUT}, schema.ROLLOUT)


def _is_finished(sample: Sample, chat: Chat) -> bool:
    return not sample.is_cut and sample.tokens[-1] in chat.stops


def summary(table: pa.Table, *, version: int, seconds: float) -> dict[str, Any]:
    """The numbers of a types.RolloutShard."""
    return {
        "num_samples": table.num_rows,
        "num_prompt_tokens": len(table["prompt_tokens"].combine_chunks().flatten()),
        "num_response_tokens": table["learn"].combine_chunks().flatten().true_count,
        "version": version,
        "seconds": seconds,
    }
