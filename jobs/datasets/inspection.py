"""Shows the content of a data file: counts, rejected rows, token lengths, and records as a model gets them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.text import Text

from actors.text.conversations import Chat
from jobs.command import out, say
from jobs.datasets.kinds import kinds_of
from jobs.datasets.written import Written, written
from jobs.prepare import find_data, policy_chat
from orchestrator.config.config import Config
from orchestrator.data.kinds import KINDS
from orchestrator.data.mixtures import is_mixture, sources_of
from orchestrator.data.streams import Stream
from orchestrator.errors import DataError
from orchestrator.training.ranking import spread, thinned

MEASURED = 2000  # records whose tokens are counted
SHOWN = 3
SHOWN_TOKENS = 400
BAR = 40
LEARNED = "green"
Item = TypeVar("Item")


def inspect(file: Path, kind: str | None, format: str, config: Config | None) -> None:
    """Prints what the file, or each file of a mixture, holds; with a config, also as its model gets it.

    Raises:
        DataError: the file can't be read, or some rows are bad.
    """
    file = find_data(file)
    if is_mixture(file):
        for source in sources_of(file):
            inspect(source.path, kind, source.format or format, config)
        return
    name, *others = kinds_of(file, kind)
    say(f"{file}: {name}" + (f" (--as {', '.join(others)} would do too)" if others else ""))
    stream = Stream(KINDS[name], file, format, max_bad_rows=None)
    records, problem = sample(stream)
    say(stream.progress().summary())
    for row in stream.bad_rows:
        say(f"  rejected {row}")
    if stream.num_bad > len(stream.bad_rows):
        say(f"  and {stream.num_bad - len(stream.bad_rows):,} more")
    if config is not None and records:
        _show(policy_chat(config), records, stream.num_records)
    if problem is not None:
        raise problem
    if stream.num_bad:
        raise DataError(f"{file}: {stream.num_bad:,} of {stream.num_rows:,} rows are bad. Correct or remove them.")
    stream.report()


def sample(stream: Iterable[Item]) -> tuple[list[Item], DataError | None]:
    """At most MEASURED records, evenly spaced, and what ended the reading early."""
    problem: DataError | None = None

    def read() -> Iterator[Item]:
        nonlocal problem
        try:
            yield from stream
        except DataError as error:
            problem = error

    return thinned(read(), MEASURED), problem


def _show(chat: Chat, records: Sequence[Any], num_records: int) -> None:
    """Token lengths and samples."""
    lengths: list[int] = []
    num_learned = 0
    refused: list[str] = []
    for record in records:
        try:
            parts = written(chat, record)
        except DataError as error:
            refused.append(f"{record.id!r}: {error}")
            continue
        lengths.append(max(len(part.tokens) for part in parts))
        num_learned += sum(int(part.learn.sum()) for part in parts)
    if refused:
        say(f"the chat template refuses {len(refused):,} of {len(records):,} records, such as {refused[0]}")
    if not lengths:
        return
    low, middle, high = (int(value) for value in np.percentile(lengths, (5, 50, 95)))
    of = f"{len(lengths):,} of {num_records:,} records" if len(lengths) < num_records else "a record"
    say(f"tokens of {of}: median {middle:,}, 5 % below {low:,}, 5 % above {high:,}, longest {max(lengths):,}")
    for line in histogram(lengths):
        say(line)
    say(f"tokens learned or scored: {num_learned / len(lengths):,.0f} a record")
    for record in spread(records, SHOWN):
        _print(chat, record)


def histogram(lengths: Sequence[int]) -> Iterator[str]:
    """Lines of a bar chart; each bin is twice as wide as the previous one."""
    bins = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(bins)
    for exponent in range(int(bins.min()), len(counts)):
        span = f"{2**exponent:,} to {2 ** (exponent + 1) - 1:,}"
        bar = "█" * round(BAR * counts[exponent] / counts.max())
        yield f"{span:>20} {counts[exponent]:>6,} {bar}".rstrip()


def _print(chat: Chat, record: Any) -> None:
    try:
        parts = written(chat, record)
    except DataError:
        return
    for part in parts:
        out.rule(f"{record.id} {part.title}".strip(), style="dim")
        out.print(coloured(chat, part, marks=not out.is_terminal))


def coloured(chat: Chat, part: Written, *, marks: bool) -> Text:
    """A part as text, with learned tokens in colour; with `marks` they are also between ⟦ and ⟧."""
    text = Text()
    tokens, learn = part.tokens[:SHOWN_TOKENS], part.learn[:SHOWN_TOKENS]
    edges = [0, *(np.flatnonzero(np.diff(learn)) + 1), len(tokens)] if len(tokens) else [0]
    for start, end in zip(edges, edges[1:], strict=False):
        words = chat.text(tokens[start:end])
        if learn[start]:
            text.append(f"⟦{words}⟧" if marks else words, style=LEARNED)
        else:
            text.append(words)
    if len(part.tokens) > SHOWN_TOKENS:
        text.append(f" … and {len(part.tokens) - SHOWN_TOKENS:,} tokens more")
    return text
