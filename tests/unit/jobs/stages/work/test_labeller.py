"""The labeller ranks by gold score plus noise that follows from (run seed, prompt id)."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from jobs.stages.work.labeller import ScoredReplies, _noise, label, rank, write_rankings
from orchestrator.data.kinds import RANKINGS
from orchestrator.data.readers import read_all
from orchestrator.data.records import Message, ToolCall
from orchestrator.errors import DataError

USER = (Message("user", "Why?"),)


def scored(identity: str, replies: str, gold: list[float | None]) -> ScoredReplies:
    return ScoredReplies(identity, USER, tuple(replies), tuple(gold))


def test_without_noise_the_best_comes_first_and_ties_keep_their_order() -> None:
    assert rank([0.1, 0.9, 0.5, 0.9], noise_std=0.0, seed=1) == (1, 3, 2, 0)
    (ranking,), report = label([scored("p", "abc", [0.1, 0.9, 0.5])], noise_std=0.0, seed=1)
    assert (ranking.record.id, ranking.record.replies, ranking.gold) == ("p", ("b", "c", "a"), (0.9, 0.5, 0.1))
    assert report.pair_agreement == 1.0


def test_noise_is_golden_normal_and_seeded() -> None:
    noise = _noise(20_000, 0.5, 3)
    assert noise == _noise(20_000, 0.5, 3) != _noise(20_000, 0.5, 4)
    assert statistics.fmean(noise) == pytest.approx(0.0, abs=0.02)
    assert statistics.stdev(noise) == pytest.approx(0.5, abs=0.01)
    inside = sum(abs(number) < 0.5 for number in noise) / len(noise)
    assert inside == pytest.approx(0.6827, abs=0.01)


def test_labels_of_a_prompt_do_not_depend_on_the_other_prompts() -> None:
    many = [scored(f"p{i}", "abcd", [0.1, 0.2, 0.3, 0.4]) for i in range(20)]
    whole, _ = label(many, noise_std=0.2, seed=1)
    some, _ = label(many[::-3], noise_std=0.2, seed=1)
    orders = {ranking.record.id: ranking.record.replies for ranking in whole}
    assert all(orders[ranking.record.id] == ranking.record.replies for ranking in some)
    assert len(set(orders.values())) > 5
    other, _ = label(many, noise_std=0.2, seed=2)
    assert [r.record.replies for r in other] != [r.record.replies for r in whole]


def test_agreement_falls_from_one_to_a_half_as_noise_grows() -> None:
    many = [scored(f"p{i}", "abcd", [0.1, 0.2, 0.3, 0.4]) for i in range(400)]
    quiet, middle, loud = (label(many, noise_std=std, seed=1)[1].pair_agreement for std in (0.0, 0.1, 100.0))
    assert quiet == 1.0 > middle > 0.75 > loud
    assert loud == pytest.approx(0.5, abs=0.05)


def test_repeated_failed_and_lonely_replies_are_counted() -> None:
    rankings, report = label(
        [scored("p", "abab", [0.1, 0.9, 0.1, 0.9]), scored("q", "aaa", [0.5] * 3), scored("r", "ab", [0.5, None])],
        noise_std=0.0,
        seed=1,
    )
    assert [ranking.record.replies for ranking in rankings] == [("b", "a")]
    assert (report.num_rankings, report.num_left_out, report.num_repeated, report.num_failed) == (1, 2, 4, 1)


def test_nothing_to_rank_is_a_data_error_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"none of 1 prompts .* Raise sample\.samples_per_prompt"):
        label([scored("q", "aaa", [0.5] * 3)], noise_std=0.1, seed=1)


def test_what_is_written_is_read_back_without_the_gold_scores(tmp_path: Path) -> None:
    rankings, _ = label([scored("p", "abc", [0.1, 0.9, 0.5]), scored("q", "é\n", [0.0, 1.0])], noise_std=0.0, seed=1)
    path = tmp_path / "preferences.jsonl"
    write_rankings(path, rankings)
    records, report = read_all(RANKINGS, path)
    assert list(records) == [ranking.record for ranking in rankings]
    assert report.format == "ranking"
    assert '"gold": [0.9, 0.5, 0.1]' in path.read_text(encoding="utf-8").splitlines()[0]


def test_begun_turns_calls_and_tools_come_back_from_the_file_as_they_were(tmp_path: Path) -> None:
    call = Message("assistant", "", (ToolCall("f", '{"x": 1}', "c1"),))
    begun = (*USER, call, Message("tool", "1", name="f", tool_call_id="c1"), Message("assistant", "So"))
    tools = ({"type": "function", "function": {"name": "f"}},)
    # One reply happens to repeat how the turn begins, and the file must not take that for a repetition.
    for replies in (("So", " it is", "So it is"), ("So", "So it is")):
        scores = ScoredReplies("p", begun, replies, (0.9, 0.5, 0.1)[: len(replies)], tools)
        rankings, _ = label([scores], noise_std=0.0, seed=1)
        write_rankings(tmp_path / "file.jsonl", rankings)
        (record,), _ = read_all(RANKINGS, tmp_path / "file.jsonl")
        assert (record.messages, record.replies, record.tools) == (begun, replies, tools)
