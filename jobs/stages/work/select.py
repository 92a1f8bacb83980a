"""The work of stage `select`: scored samples become demonstrations or preferences."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from actors.rewards.environment import episode_of
from jobs.stages.sample import SAMPLES
from jobs.stages.score import SCORES
from jobs.stages.stage import StageJob
from jobs.stages.work.score import read_table
from orchestrator.config.sections import SelectConfig
from orchestrator.data.canonical import demonstration_row, scored_ranking_row
from orchestrator.data.records import (
    DemonstrationRecord,
    Message,
    RankingRecord,
    Tools,
    content_id,
    is_begun,
    messages_from_dicts,
)
from orchestrator.errors import DataError
from orchestrator.run.storage import replacing


@dataclass(frozen=True)
class Scored:
    """A sample as far as it is chosen by. `meta` holds its conversation."""

    prompt_id: str
    meta: str
    reply: str
    score: float


async def run(job: StageJob) -> Mapping[str, Any]:
    """Raises:
    DataError: nothing is left to learn from.
    StorageError: samples or scores can't be read.
    """
    section = job.config.select
    skipped: Counter[str] = Counter()
    samples = list(_usable(read_table(job.inputs[SAMPLES]), read_table(job.inputs[SCORES]), skipped))
    rows = list(_KINDS[section.keep](samples, section, skipped))
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    if not rows:
        raise DataError(f"stage {job.name!r} selects nothing of {sum(skipped.values())} samples: {reasons or 'none'}.")
    path = job.run.place / job.makes[0].path
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    job.say(f"{job.name}: {len(rows)} {job.makes[0].kind}{'; left out: ' + reasons if reasons else ''}")
    return {"selected": len(rows), **skipped}


def _usable(samples: pa.Table, scores: pa.Table, skipped: Counter[str]) -> Iterator[Scored]:
    """Samples with a score that ended on their own: a reply that was cut would teach to break off."""
    columns = [samples[name].to_pylist() for name in ("prompt_id", "meta", "response_text", "finish_reason")]
    for prompt_id, meta, text, reason, score in zip(*columns, scores["reward"].to_pylist(), strict=True):
        if score is None:
            skipped["without a score"] += 1
        elif reason != "stop":
            skipped["cut by length"] += 1
        elif unfit := _unfit(episode_of(json.loads(meta))):
            skipped[unfit] += 1
        else:
            yield Scored(prompt_id, meta, text, score)


def _unfit(episode: Mapping[str, Any] | None) -> str:
    """Why an episode can't be learned, or ""."""
    if episode is None:
        return ""
    if episode.get("cut_turns"):
        return "with a turn that was cut by length"
    turns = (turn for held in episode["conversations"] for turn in held["messages"])
    is_silent = any(turn["role"] == "user" and not turn["content"].strip() for turn in turns)
    return "with an empty turn of the environment" if is_silent else ""


def _best(samples: Sequence[Scored], section: SelectConfig, skipped: Counter[str]) -> Iterator[Mapping[str, Any]]:
    for group in _by_prompt(samples):
        skipped["worse than the best reply to their prompt"] += len(group) - 1
        yield from _demonstrations(max(group, key=lambda sample: sample.score))


def _top(samples: Sequence[Scored], section: SelectConfig, skipped: Counter[str]) -> Iterator[Mapping[str, Any]]:
    count = math.ceil(section.share * len(samples))
    order = sorted(range(len(samples)), key=lambda number: (-samples[number].score, number))
    skipped["below the best share"] += len(samples) - count
    for number in sorted(order[:count]):
        yield from _demonstrations(samples[number])


def _pairs(samples: Sequence[Scored], section: SelectConfig, skipped: Counter[str]) -> Iterator[Mapping[str, Any]]:
    for group in _by_prompt(samples):
        ordered = _distinct(group)
        best, worst = ordered[0], ordered[-1]
        if best.reply == worst.reply or best.score == worst.score:
            skipped["of prompts whose replies are equally good"] += len(group)
        elif best.score - worst.score < section.min_margin:
            skipped["of prompts whose replies differ by less than select.min_margin"] += len(group)
        else:
            yield _ranking([best, worst])


def _rankings(samples: Sequence[Scored], section: SelectConfig, skipped: Counter[str]) -> Iterator[Mapping[str, Any]]:
    for group in _by_prompt(samples):
        ordered = _distinct(group)
        if len(ordered) < 2:
            skipped["of prompts whose replies are equal"] += len(group)
        else:
            yield _ranking(ordered)


_KINDS: Mapping[str, Callable[[Sequence[Scored], SelectConfig, Counter[str]], Iterable[Mapping[str, Any]]]] = {
    "best": _best,
    "top": _top,
    "pairs": _pairs,
    "rankings": _rankings,
}


def _by_prompt(samples: Sequence[Scored]) -> Iterator[list[Scored]]:
    """Prompts in the order of their first samples."""
    groups: dict[str, list[Scored]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt_id, []).append(sample)
    yield from groups.values()


def _distinct(group: Sequence[Scored]) -> list[Scored]:
    """Best first; of equal replies the first."""
    found: dict[str, Scored] = {}
    for sample in sorted(group, key=lambda sample: -sample.score):
        found.setdefault(sample.reply, sample)
    return list(found.values())


def _demonstrations(sample: Scored) -> Iterator[Mapping[str, Any]]:
    """One, or one for each conversation of an episode. All turns of the policy are learned."""
    for whole, tools in _held(sample):
        yield {**demonstration_row(DemonstrationRecord(content_id(whole, tools), whole, tools)), "score": sample.score}


def _held(sample: Scored) -> Iterator[tuple[tuple[Message, ...], Tools]]:
    """The conversations of a sample."""
    episode = episode_of(json.loads(sample.meta))
    if episode is not None:
        for held in episode["conversations"]:
            yield messages_from_dicts(held["messages"]), tuple(held.get("tools", ()))
        return
    messages, tools = _conversation(sample)
    if is_begun(messages):
        *earlier, last = messages
        yield (*earlier, replace(last, content=last.content + sample.reply)), tools
    else:
        yield (*messages, Message("assistant", sample.reply)), tools


def _ranking(ordered: Sequence[Scored]) -> Mapping[str, Any]:
    messages, tools = _conversation(ordered[0])
    record = RankingRecord(ordered[0].prompt_id, messages, tuple(sample.reply for sample in ordered), tools)
    return scored_ranking_row(record, [sample.score for sample in ordered])


def _conversation(sample: Scored) -> tuple[tuple[Message, ...], Tools]:
    meta = json.loads(sample.meta)
    return messages_from_dicts(meta["messages"]), tuple(meta.get("tools", ()))
