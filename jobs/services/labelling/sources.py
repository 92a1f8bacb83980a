"""What can be judged: records of data files, samples of a run's stage, steps of its experience log."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.datasets.kinds import kinds_of
from orchestrator.config.yaml_text import parse_yaml
from orchestrator.data.kinds import KINDS, reply_in
from orchestrator.data.mixtures import stream_of
from orchestrator.data.records import (
    DemonstrationRecord,
    LabelledRecord,
    PromptRecord,
    RankingRecord,
    ScoredRecord,
    message_dict,
    message_dicts,
    reply_json,
)
from orchestrator.errors import DataError
from orchestrator.run.folder import CONFIG_FILE

SAMPLES_FILE = "samples.parquet"
_COLUMNS = ["prompt_id", "sample_index", "seed", "response_text", "finish_reason", "version", "meta"]
_SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens")
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A prompt that people may judge replies to, or write one for.

    Args:
        replies: {reply, source}; `reply` is text or a message.
        scores: of the replies, which are best first then; empty: their order means nothing.
    """

    prompt_id: str
    messages: Sequence[Json]
    tools: Sequence[Json]
    replies: Sequence[Json]
    source: Json
    scores: Sequence[float] = field(default=())


def from_file(path: Path, format: str, kind: str | None) -> Iterator[Candidate]:
    """The records of a data file or a mixture. Raises DataError."""
    name, *_ = kinds_of(path, kind)
    if name == "documents":
        raise DataError(f"{path} holds texts without a prompt, which nobody can judge; docs/data.md lists formats.")
    stream = stream_of(KINDS[name], path, format)
    for record in stream:
        replies, scores = _REPLIES[type(record)](record)
        messages = record.messages[:-1] if isinstance(record, DemonstrationRecord) else record.messages
        yield Candidate(
            record.id,
            message_dicts(messages),
            list(record.tools),
            [{"reply": reply, "source": {}} for reply in replies],
            {"file": path.name},
            scores,
        )
    stream.report()


def from_run(folder: Path, *, stage: str | None, step: int | None) -> Iterator[Candidate]:
    """The samples of a stage, or of a step of the experience log, grouped by prompt.

    Raises DataError: they are missing, or can't be read.
    """
    files = _step_files(folder, stage, step) if step is not None else [_samples_file(folder, stage)]
    place = files[0].parent if step is None else files[0].parents[2]
    name = stage or ("" if place == folder else place.name)
    return of_samples(files, folder, name, step=step)


def of_samples(files: Sequence[Path], folder: Path, stage: str, *, step: int | None = None) -> Iterator[Candidate]:
    """The samples in files of the run in `folder`, grouped by prompt.

    Args:
        stage: the stage that sampled, for the source of the items.

    Raises:
        DataError: they can't be read.
    """
    source = {"run": folder.resolve().name, "stage": stage, "step": step, "sampling": _sampling(folder, stage)}
    try:
        table = pa.concat_tables(pq.read_table(file, columns=_COLUMNS) for file in files)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{files[0]}: samples can't be read ({error}).") from None
    groups: dict[str, list[Json]] = {}
    for row in table.to_pylist():
        groups.setdefault(row["prompt_id"], []).append(row)
    for prompt_id, rows in groups.items():
        meta = json.loads(rows[0]["meta"])
        replies = [
            {
                "reply": row["response_text"],
                "source": {key: row[key] for key in ("sample_index", "seed", "version", "finish_reason")},
            }
            for row in rows
        ]
        yield Candidate(prompt_id, meta["messages"], list(meta.get("tools", ())), replies, source)


def _ranked(record: RankingRecord) -> tuple[list[Any], Sequence[float]]:
    count = len(record.replies)
    return [reply_json(reply) for reply in record.replies], record.scores or [float(count - n) for n in range(count)]


def _one(record: LabelledRecord | ScoredRecord) -> tuple[list[Any], Sequence[float]]:
    return [reply_json(record.reply)], ()


def _written(record: PromptRecord) -> tuple[list[Any], Sequence[float]]:
    reply = reply_in(record)
    return [reply] if isinstance(reply, str) else [], ()


def _last_turn(record: DemonstrationRecord) -> tuple[list[Any], Sequence[float]]:
    return [message_dict(record.messages[-1])], ()


_REPLIES: Mapping[type, Callable[[Any], tuple[list[Any], Sequence[float]]]] = {
    RankingRecord: _ranked,
    LabelledRecord: _one,
    ScoredRecord: _one,
    PromptRecord: _written,
    DemonstrationRecord: _last_turn,
}


def _samples_file(folder: Path, stage: str | None) -> Path:
    places = [folder / "stages" / stage] if stage else [folder, *folder.glob("stages/*")]
    found = [place / SAMPLES_FILE for place in places if (place / SAMPLES_FILE).is_file()]
    if not found:
        raise DataError(
            f"{places[0]} holds no {SAMPLES_FILE}: run a stage `sample`, or give --step for a step of stage rl."
        )
    return max(found, key=lambda file: file.stat().st_mtime)


def _step_files(folder: Path, stage: str | None, step: int) -> Sequence[Path]:
    """The files that a step's manifest names."""
    places = [folder / "stages" / stage] if stage else [folder, *folder.glob("stages/*")]
    for place in places:
        log = place / "log" / f"step-{step:06d}"
        if (log / "manifest.json").is_file():
            manifest = json.loads((log / "manifest.json").read_text(encoding="utf-8"))
            return [log / Path(shard["file"]).name for shard in manifest["shards"]]
    raise DataError(f"{folder}: the log has no step {step}; `rlhf why {folder}` says how far the run is.")


def _sampling(folder: Path, stage: str) -> Json:
    """Settings of the rollout, as far as the run's config names them."""
    file = folder / CONFIG_FILE
    tree = parse_yaml(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rollout = tree.get("rollout", {}) if isinstance(tree, dict) else {}
    found = {name: rollout[name] for name in _SAMPLING if name in rollout}
    for entry in tree.get("stages") or () if isinstance(tree, dict) else ():
        if isinstance(entry, dict) and entry.get("name", entry.get("kind")) == stage:
            found |= _changed(entry.get("set") or {})
    return found


def _changed(keys: Json) -> Json:
    names = {name: f"rollout.{name}" for name in _SAMPLING}
    return {name: keys[key] for name, key in names.items() if key in keys}


def distinct(replies: Iterable[Json]) -> list[int]:
    """Indices of replies that differ from earlier ones, and are not empty."""
    seen: set[str] = set()
    found = []
    for index, each in enumerate(replies):
        reply = each["reply"]
        text = reply.strip() if isinstance(reply, str) else json.dumps(reply, sort_keys=True)
        if text and text not in seen:
            seen.add(text)
            found.append(index)
    return found
