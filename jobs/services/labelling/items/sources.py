"""What can be judged: records of data files, trees of messages, samples of a run's stage, steps of its log."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.datasets.kinds import kinds_of
from jobs.services.labelling.items.trees import TREES, Tree, holds_trees
from orchestrator.config.yaml_text import parse_yaml
from orchestrator.data.inputs import read_text
from orchestrator.data.kinds import KINDS, reply_in
from orchestrator.data.mixtures import stream_of
from orchestrator.data.records import (
    DemonstrationRecord,
    LabelledRecord,
    PromptRecord,
    RankingRecord,
    ReadReport,
    ScoredRecord,
    message_dict,
    message_dicts,
    reply_json,
)
from orchestrator.data.streams import Stream
from orchestrator.errors import DataError, StorageError
from orchestrator.run.experience_log import committed_files
from orchestrator.run.folder import CONFIG_FILE, stage_place

SAMPLES_FILE = "samples.parquet"
_LOG = "log"
_REWARD = "reward"  # only samples of the log have one
_KEPT = ("sample_index", "seed", "version", "finish_reason", _REWARD)
_NEEDED = ["prompt_id", "response_text", "meta", *_KEPT[:-1]]
_SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens")
Json = Mapping[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A prompt that people may judge replies to, or write one for.

    Args:
        replies: {reply, source}; `reply` is text or a message.
        scores: of the replies, in their order; empty: nothing is known of which is better.
    """

    prompt_id: str
    messages: Sequence[Json]
    tools: Sequence[Json]
    replies: Sequence[Json]
    source: Json
    scores: Sequence[float] = field(default=())


def from_file(path: Path, format: str, kind: str | None, tell: Say = lambda line: None) -> Iterator[Candidate | Tree]:
    """The records of a data file or a mixture; of OASST trees every message of a prompter, with all replies to it.

    Args:
        tell: gets a line about rows, or parts of them, that nobody can judge.

    Raises:
        DataError: the file can't be read, or has bad rows.
    """
    if kind in (None, "preferences") and holds_trees(path, format):
        yield from _from_trees(path, tell)
        return
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
    _tell(stream.report(), tell)


def _from_trees(path: Path, tell: Say) -> Iterator[Candidate | Tree]:
    stream = Stream(TREES, path)
    for tree in stream:
        yield tree
        for turn in tree.asked():
            ranks: list[Any] = [reply.get("rank") for reply in turn.replies]
            yield Candidate(
                tree.id,
                message_dicts(turn.path),
                [],
                [{"reply": reply["text"], "source": _of_message(reply)} for reply in turn.replies],
                {"file": path.name, "tree": tree.id, "message": turn.node["message_id"]},
                [-rank for rank in ranks] if all(isinstance(rank, int) for rank in ranks) else (),
            )
    _tell(stream.report(), tell)


def _of_message(node: Json) -> Json:
    model = node.get("model_name")
    return {"message": node["message_id"], **({} if model is None else {"model": model})}


def _tell(report: ReadReport, tell: Say) -> None:
    if report.left_out:
        tell(report.summary())


def from_run(folder: Path, *, stage: str | None, step: int | None) -> Iterator[Candidate]:
    """The samples of a stage, or of a step of the experience log with their rewards, grouped by prompt.

    Raises DataError: they are missing, or can't be read.
    """
    files = sample_files(folder, stage=stage, step=step)
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
    groups: dict[str, list[Json]] = {}
    for row in itertools.chain.from_iterable(map(_samples, files)):
        groups.setdefault(row["prompt_id"], []).append(row)
    for prompt_id, rows in groups.items():
        meta = json.loads(rows[0]["meta"])
        replies = [
            {"reply": row["response_text"], "source": {key: row[key] for key in _KEPT if key in row}} for row in rows
        ]
        yield Candidate(prompt_id, meta["messages"], list(meta.get("tools", ())), replies, source)


def sample_files(folder: Path, *, stage: str | None, step: int | None) -> Sequence[Path]:
    """The files with the samples of a stage, or of a step. Raises DataError: there are none."""
    return _step_files(folder, stage, step) if step is not None else [_samples_file(folder, stage)]


def _samples(file: Path) -> list[Json]:
    try:
        columns = [*_NEEDED, *({_REWARD} & set(pq.read_schema(file).names))]
        found: list[Json] = pq.read_table(file, columns=columns).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: samples can't be read ({error}). Restore it from a copy, or give others.") from None
    return found


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
    places = _places(folder, stage)
    found = [place / SAMPLES_FILE for place in places if (place / SAMPLES_FILE).is_file()]
    if not found:
        raise DataError(
            f"{places[0]} holds no {SAMPLES_FILE}: run a stage `sample`, or give --step for a step of stage rl."
        )
    return max(found, key=lambda file: file.stat().st_mtime)


def _step_files(folder: Path, stage: str | None, step: int) -> Sequence[Path]:
    """The files that a step's manifest names."""
    for place in _places(folder, stage):
        try:
            files = committed_files(place / _LOG, step)
        except StorageError as error:
            raise DataError(f"step {step} can't be judged: {error}") from None
        if files:
            return files
    raise DataError(f"{folder}: the log has no step {step}; `rlhf why {folder}` says how far the run is.")


def _places(folder: Path, stage: str | None) -> Sequence[Path]:
    return [stage_place(folder, stage)] if stage else [folder, *folder.glob("stages/*")]


def _sampling(folder: Path, stage: str) -> Json:
    """Settings of the rollout, as far as the run's config names them."""
    file = folder / CONFIG_FILE
    try:
        tree = parse_yaml(read_text(file, f"the run's config {file}", DataError)) if file.is_file() else {}
    except ValueError as error:
        raise DataError(f"the run's config {file} is not YAML ({error}); restore it from a copy.") from None
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
