from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from actors.text.conversations import Chat, chat_of
from actors.training.ranked_rows import RankedRows, stored_rankings
from actors.training.ranked_tokens import RankedTokens, judged
from jobs.prepare import without_prompts
from jobs.stages.work.data import judged as module
from jobs.stages.work.data import sampling, storing
from jobs.stages.work.data.judged import (
    StoredJudgements,
    measure,
    measure_heads,
    measure_held_out,
    measure_singles,
    sample,
    sizes,
    store_judged,
)
from orchestrator.config.config import Config
from orchestrator.data.kinds import RANKINGS
from orchestrator.data.readers import read_all
from orchestrator.data.records import Message, RankingRecord
from orchestrator.data.streams import Stream
from orchestrator.errors import DataError
from orchestrator.prompts import marked_held_out
from orchestrator.training.ensemble import Disagreement
from tests.tiny import CHATML, tiny_tokenizer

SHARED = Path(__file__).parents[7] / "shared" / "data"


@pytest.fixture(scope="module")
def chat() -> Chat:
    return chat_of(tiny_tokenizer(chat_template=CHATML))


RECORDS = [RankingRecord(f"p{n}", (Message("user", str(n)),), ("good", "bad")) for n in range(200)]


def split_held_out(
    records: Sequence[RankingRecord], held_out: int | None, *, section: str
) -> tuple[tuple[RankingRecord, ...], tuple[RankingRecord, ...]]:
    marked = list(marked_held_out(records, held_out, section=section))
    train, kept = (tuple(record for record, mark in marked if mark == is_held_out) for is_held_out in (False, True))
    return train, kept


def test_the_last_records_are_held_out() -> None:
    train, held_out = split_held_out(RECORDS, 20, section="preferences")
    assert (*train, *held_out) == tuple(RECORDS) and len(held_out) == 20
    assert split_held_out(RECORDS, 0, section="preferences") == (tuple(RECORDS), ())


def test_without_a_number_a_tenth_is_held_out_whatever_else_is_in_the_file() -> None:
    train, held_out = split_held_out(RECORDS, None, section="preferences")
    assert 8 <= len(held_out) <= 35 and len(train) + len(held_out) == 200
    assert set(split_held_out(RECORDS[::2], None, section="preferences")[1]) == set(held_out) & set(RECORDS[::2])


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match=r"preferences\.held_out"):
        split_held_out(RECORDS[:5], 5, section="preferences")


def test_quality_by_hand() -> None:
    quality = measure([[3.0, 2.0, 1.0], [1.0, 2.0], [0.0, 0.0]])
    assert quality.num_pairs == 5
    assert quality.accuracy == pytest.approx(3.5 / 5)
    assert quality.kendall_tau == 1.0
    low, high = quality.interval
    assert low < 0.7 < high
    assert measure([[3.0, 2.0, 1.0]], gold=[[1.0, 2.0, 3.0]]).kendall_tau == -1.0
    assert measure([]).accuracy is None and measure([]).kendall_tau is None


def test_single_replies_are_compared_where_they_were_judged_differently() -> None:
    # Stars 3, 3, 1, 1 with scores 1, 0.5, 2, 1: wrong, equal, wrong, wrong.
    quality = measure_singles([2.0, 1.0, 0.5, 1.0], [1.0, 3.0, 3.0, 1.0])
    assert (quality.num_pairs, quality.accuracy) == (4, 0.125)
    assert measure_singles([2.0, 1.0], [0.0, 0.0]).accuracy is None
    assert measure_singles([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]).kendall_tau == 1.0


def test_records_say_how_they_are_measured() -> None:
    assert measure_held_out([[0.0], [1.0], [2.0], [3.0]], [[0.0], [0.0], [1.0], [1.0]]).accuracy == 1.0
    assert measure_held_out([[0.0, 1.0]] * 200, [[0.0, -1.0]] * 200).accuracy == 0.0
    assert measure_held_out([], []).accuracy is None


def test_heads_are_measured_alone_and_their_disagreement_by_whether_their_mean_is_right() -> None:
    # Differences of the heads: 2 and 0 (mean 1, deviation 1), -4 and 1 (mean -1.5, deviation 2.5).
    heads = [[[3.0, 1.0], [1.0, 1.0]], [[0.0, 2.0], [4.0, 1.0]]]
    pairs = [[0.0, -1.0]] * 2
    found = measure_heads(heads, pairs)
    assert found is not None
    assert (found.accuracies, found.right, found.wrong) == ([0.5, 0.75], 1.0, 2.5)
    assert measure_heads([[[1.0], [0.0]]] * 2, pairs) is None and measure_heads([], []) is None


def test_heads_that_judge_replies_of_one_quality_have_no_pairs_to_compare() -> None:
    found = measure_heads([[[1.0, 2.0]], [[2.0, 1.0]]], [[1.0], [1.0]])
    assert found == Disagreement([None, None], None, None)


def test_heads_of_single_replies_are_measured_on_pairs_of_them() -> None:
    found = measure_heads([[[0.0, 0.0]], [[1.0, 3.0]], [[-2.0, 1.0]]], [[0.0], [1.0], [1.0]])
    assert found is not None
    # Better less worse: 1 and 3 (right), -2 and 1 (wrong).
    assert (found.accuracies, found.right, found.wrong) == ([0.5, 1.0], 1.0, 1.5)


def config_of(path: Path, **keys: object) -> Config:
    return Config.model_validate({"preferences": {"path": str(path), **keys}})


def stored(config: Config, chat: Chat, folder: Path, *, max_length: int = 60) -> StoredJudgements:
    tokens = RankedTokens(chat, max_length), RankedTokens(chat, max_length)
    return asyncio.run(store_judged(config, "rankings", tokens, folder, lambda text: None, made=None))


def rows_of(ranked: RankedRows, record: int) -> list[tuple[list[int], list[int], float, float]]:
    rows = ranked.rows
    quality, group = rows.row_column("quality"), rows.row_column("group")
    found = []
    for row in ranked.rows_of(record):
        prompt, response = rows.texts(row)
        found.append((prompt.tolist(), response.tolist(), float(quality[row]), float(group[row])))
    return found


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
@pytest.mark.parametrize("held_out", [None, 0, 11])
@pytest.mark.parametrize("name", ["hh-rlhf-harmless.jsonl.gz", "oasst-trees-en.jsonl.gz"])
def test_the_stored_rows_are_those_of_the_records_in_memory(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, held_out: int | None
) -> None:
    monkeypatch.setattr(storing, "APPENDED_ROWS", 37)
    records, report = read_all(RANKINGS, SHARED / name, limit=150)
    found = stored(config_of(SHARED / name, limit=150, held_out=held_out), chat, tmp_path)
    assert found.report == report
    num_truncated = 0
    for part, (folder, some) in enumerate(
        zip(found.folders, split_held_out(records, held_out, section="preferences"), strict=True)
    ):
        ranked = stored_rankings(folder)
        assert ranked.num_records == len(some) == (found.train, found.held_out)[part].num_records
        for number, record in enumerate(some):
            expected = []
            for place, reply in enumerate(record.replies):
                whole = chat.reply(record.messages, reply, record.tools)
                tokens, size = whole.tokens.tolist()[-60:], len(whole.response_tokens)
                num_truncated += len(tokens) < len(whole)
                start = max(len(tokens) - size, 1)
                expected.append((tokens[:start], tokens[start:], float(-place), float(number)))
            assert rows_of(ranked, number) == expected
    assert found.num_truncated == num_truncated > 0
    held = split_held_out(records, held_out, section="preferences")[1]
    assert found.held_out_qualities() == [judged(record)[1] for record in held]


def test_few_records_are_held_at_a_time(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "APPENDED_ROWS", 8)
    held: list[int] = []

    class Counting(Stream[RankingRecord]):
        def __iter__(self) -> Iterator[RankingRecord]:
            for number, record in enumerate(super().__iter__()):
                if number % 50 == 49:
                    held.append(sum(type(found) is RankingRecord for found in gc.get_objects()))
                yield record

    monkeypatch.setattr(module, "stream", lambda config, *_: Counting(RANKINGS, str(config.preferences.path)))
    config = config_of(write(tmp_path, 300), held_out=5)
    before = sum(type(found) is RankingRecord for found in gc.get_objects())
    assert stored(config, chat, tmp_path).train.num_records == 295
    assert len(held) == 6 and max(held) - before < 20, "5 wait to be held out, 4 to be written"


def test_bad_rows_leave_no_rows(chat: Chat, tmp_path: Path) -> None:
    path = write(tmp_path, 30)
    with path.open("a") as file:
        file.write('{"prompt": 4, "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(DataError, match="1 bad row"):
        stored(config_of(path), chat, tmp_path)
    assert not any((tmp_path / "train").iterdir())
    with pytest.raises(DataError, match="1 bad row"):
        sample(config_of(path), "rankings")


def test_the_digests_follow_the_records(chat: Chat, tmp_path: Path) -> None:
    one = stored(config_of(write(tmp_path, 30), held_out=3), chat, tmp_path / "one").digests
    assert stored(config_of(write(tmp_path, 30), held_out=3), chat, tmp_path / "other").digests == one
    assert stored(config_of(write(tmp_path, 31), held_out=3), chat, tmp_path / "third").digests != one


def test_a_sample_stands_for_all(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MEASURED", 10)
    config = config_of(write(tmp_path, 60), held_out=5)
    found = sample(config, "rankings")
    assert len(found.some) == 10 and (found.num_records, found.num_replies) == (55, 110)
    known = sizes(config, without_prompts(chat), "rankings", chat, 20)
    assert known.num_records == 55 and len(known.lengths) == 110 and known.lengths.max() <= 20


def write(folder: Path, count: int) -> Path:
    path = folder / "pairs.jsonl"
    rows = [{"prompt": f"number {n}?", "chosen": f"{n} it is", "rejected": "no"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
