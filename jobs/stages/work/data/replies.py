"""Replies that were written elsewhere, as stage `score` takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from actors.engines.contract import Sample, rollout_table
from actors.text.conversations import Chat
from jobs.prepare import find_data, prompt_meta
from orchestrator.config.config import Config
from orchestrator.data.kinds import ANSWERED, reply_in
from orchestrator.data.readers import read_all
from orchestrator.data.records import PromptRecord, ReadReport
from orchestrator.types import Prompt, SampleRequest


def read_replies(config: Config) -> tuple[tuple[PromptRecord, ...], ReadReport]:
    """Raises DataError."""
    path = config.score.path
    assert path is not None
    return read_all(ANSWERED, find_data(path), config.score.format)


def replies_table(records: Sequence[PromptRecord], chat: Chat) -> pa.Table:
    """Replies from outside as a table of schema.ROLLOUT, in the order of the file. Log-probs are 0, as nothing is known
    about them.

    Raises:
        DataError: the chat template refuses a conversation.
    """
    requests, samples = [], []
    counts: Counter[str] = Counter()
    for row, record in enumerate(records):
        written = chat.reply(record.messages, reply_in(record), record.tools)
        prompt = Prompt(record.id, record.text, written.prompt_tokens, prompt_meta(record))
        requests.append(SampleRequest(row, prompt, counts[record.id], 0))
        samples.append(Sample(written.response_tokens.tolist(), [0.0] * len(written.response_tokens)))
        counts[record.id] += 1
    table = rollout_table(requests, samples, chat=chat, version=0)
    place = table.schema.get_field_index("response_text")  # the text itself: not every tokenizer keeps all of it
    return table.set_column(place, table.schema.field(place), pa.array([reply_in(record) for record in records]))
