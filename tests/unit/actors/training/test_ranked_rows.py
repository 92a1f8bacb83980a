from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.learning.distributed import Group
from actors.learning.objectives.preference import mismatched
from actors.text.conversations import chat_of
from actors.training.ranked_rows import Mismatched
from actors.training.ranked_tokens import RankedTokens, mismatched_table, padding_token
from actors.training.trainer import training_batches
from orchestrator.config.trainings import PreferenceConfig
from orchestrator.data.records import Message, RankingRecord
from tests.rows import ranked_rows, ranked_table
from tests.tiny import tiny_tokenizer

CHAT = chat_of(tiny_tokenizer())
TOKENIZER = CHAT.tokenizer


def _record(question: str, *replies: str) -> RankingRecord:
    return RankingRecord(question, (Message("user", question),), replies)


def _table(*num_replies: int, learns_prompts: bool = False) -> pa.Table:
    records = [
        _record("why " * (i + 1), *(f"{'so ' * (k + i)}{k}" for k in range(n))) for i, n in enumerate(num_replies)
    ]
    return ranked_table(records, CHAT, max_length=200, learns_prompts=learns_prompts)


def test_a_record_owns_its_replies_in_order() -> None:
    ranked = ranked_rows(_table(2, 3))
    assert [list(ranked.rows_of(i)) for i in range(ranked.num_records)] == [[0, 1], [2, 3, 4]]
    assert ranked.rows.row_column("quality").tolist() == [0, -1, 0, -1, -2]
    assert ranked.rows.row_column("group").tolist() == [0, 0, 1, 1, 1]
    assert ranked.by_record("abcde") == [["a", "b"], ["c", "d", "e"]]
    assert ranked.num_tokens([1]) == sum(ranked.rows.lengths[2:])


def test_scores_of_a_record_are_its_strengths_and_places_where_it_has_none() -> None:
    scored = replace(_record("Why?", "So.", "No.", "Or."), scores=(2.0, 2.0, 0.5))
    table = ranked_table([_record("Who?", "I.", "You."), scored], CHAT, max_length=200)
    assert table["strength"].to_pylist() == [0, -1, 2, 2, 0.5]
    assert table["quality"].to_pylist() == [0, -1, 0, -1, -2]
    ranked = ranked_rows(table)
    assert ranked.rows.pack((3, 4), torch.device("cpu")).columns["strength"].tolist() == [2, 0.5]


def test_a_transcript_within_the_limit_is_what_a_sampled_response_looks_like() -> None:
    record = _record("How far is it?", "Two miles.", "Far.")
    tokens = RankedTokens(CHAT, 200)
    tokens.add(record)
    table = tokens.take()
    for row, reply in enumerate(record.replies):
        transcript = CHAT.reply(record.messages, reply)
        assert table["prompt_tokens"][row].as_py() == transcript.prompt_tokens.tolist()
        assert table["response_tokens"][row].as_py() == transcript.response_tokens.tolist()
        assert transcript.response_tokens[-1] == TOKENIZER.eos_token_id
    assert tokens.num_truncated == 0


@pytest.mark.parametrize("max_length", [30, 12, 5, 2])
def test_a_longer_transcript_keeps_its_end_and_is_counted(max_length: int) -> None:
    record = _record("How far is it to the sea from here, please?", "Two miles.", "It is far away.")
    tokens = RankedTokens(CHAT, max_length)
    tokens.add(record)
    table = tokens.take()
    assert tokens.num_truncated == 2
    for row, reply in enumerate(record.replies):
        whole = CHAT.reply(record.messages, reply).tokens
        prompt, response = (table[name][row].as_py() for name in ("prompt_tokens", "response_tokens"))
        assert prompt and response
        assert prompt + response == whole[-max_length:].tolist()


@given(
    num_replies=st.lists(st.integers(2, 5), min_size=1, max_size=9),
    world_size=st.integers(1, 4),
    budget=st.sampled_from([1, 150, 600, 5000]),
)
def test_micro_batches_hold_whole_records_within_the_budget(
    num_replies: list[int], world_size: int, budget: int
) -> None:
    ranked = ranked_rows(_table(*num_replies))
    records = list(range(len(num_replies)))
    plans = [ranked.micro_batches(records, Group(rank, world_size), budget) for rank in range(world_size)]
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(row for plan in plans for micro in plan for row in micro) == list(range(sum(num_replies)))
    owner = [record for record in records for _ in ranked.rows_of(record)]
    for micro in (micro for plan in plans for micro in plan if micro):
        held = {owner[row] for row in micro}
        assert sorted(micro) == sorted(row for record in held for row in ranked.rows_of(record))
        if len(held) > 1:
            assert len(micro) * max(ranked.rows.lengths[row] for row in micro) <= budget


def test_padding_never_ends_a_transcript() -> None:
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    last = CHAT.reply((Message("user", "Hi"),), "Hello").tokens[-1]
    assert padding_token(CHAT) != last
    other = tiny_tokenizer()
    other.pad_token = "</s>"
    assert padding_token(chat_of(other)) == other.pad_token_id


def test_rows_are_packed_with_their_rank_and_record() -> None:
    ranked = ranked_rows(_table(2, 2))
    micro = ranked.rows.pack((2, 3), torch.device("cpu"))
    assert micro.columns["quality"].tolist() == [0, -1]
    assert micro.columns["group"].tolist() == [1, 1]
    ends = micro.input_ids_BT.flatten()[micro.last_index_B]
    assert np.all(ends.numpy() == TOKENIZER.eos_token_id)


def test_log_probs_of_the_reference_go_with_the_rows() -> None:
    ranked = ranked_rows(_table(2, 2)).with_reference(np.array([-1, -2, -3, -4], dtype=np.float32))
    assert ranked.rows.pack((2, 1), torch.device("cpu")).columns["reference"].tolist() == [-3, -2]
    assert ranked.rows.take([3, 0]).row_column("reference").tolist() == [-4, -1]


def test_a_learned_prompt_is_that_of_the_best_reply_without_its_first_token() -> None:
    table = _table(2, 3)
    plain, ranked = ranked_rows(table), ranked_rows(_table(2, 3, learns_prompts=True))
    assert ranked.rows.lengths == plain.rows.lengths
    for row in range(5):
        prompt, reply = (table[name][row].as_py() for name in ("prompt_tokens", "response_tokens"))
        micro = ranked.rows.pack((row,), torch.device("cpu"))
        assert micro.input_ids_BT.tolist() == [prompt + reply]
        is_best = row in (0, 2)
        assert micro.targets_N.tolist() == (prompt[1:] if is_best else []) + reply
        assert micro.columns["reply"].tolist() == [0.0] * (len(prompt) - 1) * is_best + [1.0] * len(reply)
        assert micro.lengths_B.tolist() == [len(micro.targets_N)]
        assert micro.columns["quality"].tolist() == [table["quality"][row].as_py()]


def test_a_mismatched_row_is_a_prompt_with_the_best_reply_to_another() -> None:
    table = _table(2, 2, 2)
    ranked = ranked_rows(table)
    mixed = mismatched_table(ranked, [(0, 2), (1, 0)], max_length=200, first=7)
    prompts, replies = (table[name].to_pylist() for name in ("prompt_tokens", "response_tokens"))
    assert mixed["prompt_tokens"].to_pylist() == [prompts[0], prompts[2]]
    assert mixed["response_tokens"].to_pylist() == [replies[4], replies[0]]
    assert mixed["record"].to_pylist() == [7, 8]
    assert ranked_rows(mismatched_table(ranked, [(0, 2)], max_length=5)).rows.lengths == [5]


@pytest.mark.parametrize(("num_records", "epochs", "per_batch"), [(7, 3, 2), (2, 5, 2), (5, 2, 1), (0, 1, 4)])
def test_every_mismatched_pair_of_a_training_has_one_row(num_records: int, epochs: int, per_batch: int) -> None:
    passes = PreferenceConfig(epochs=epochs, records_per_batch=per_batch)
    pairs = Mismatched(num_records, passes, 3)
    used = [mismatched(records) for _, _, records in training_batches(num_records, passes, 3)]
    expected = list(dict.fromkeys(pair for batch in used for pair in batch))
    assert list(pairs) == expected and len(pairs) == len(expected)
    for batch in used:
        assert pairs.rows_of(batch) == [expected.index(pair) for pair in batch]


def test_rows_that_are_taken_are_packed_as_before() -> None:
    ranked = ranked_rows(_table(2, 3, 2, learns_prompts=True))
    chosen = [5, 0, 3]
    one, other = (
        ranked.rows.pack(chosen, torch.device("cpu")),
        ranked.rows.take(chosen).pack((0, 1, 2), torch.device("cpu")),
    )
    for name in ("input_ids_BT", "state_index_N", "targets_N", "last_index_B", "lengths_B"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert {name: column.tolist() for name, column in one.columns.items()} == {
        name: column.tolist() for name, column in other.columns.items()
    }


def test_replies_share_their_prompt_where_that_is_less_work() -> None:
    record = _record("How far is it to the sea from here, please? " * 3, "Two miles.", "It is far.", "Far.")
    table = ranked_table([record, record], CHAT, max_length=400)
    apart, together = (ranked_rows(table, shares_prompts=shares) for shares in (False, True))
    micro = together.rows.pack(range(6), torch.device("cpu"))
    assert micro.rows == (0, 1, 2, 3, 4, 5)
    assert len(micro.input_ids_BT) < 6 and micro.input_ids_BT.numel() < 6 * max(apart.rows.lengths)
    assert micro.targets_N.tolist() == apart.rows.pack(range(6), torch.device("cpu")).targets_N.tolist()
    budget = together.rows.line_length((0, 1, 2))
    assert together.micro_batches([0, 1], Group(), budget) == [(0, 1, 2), (3, 4, 5)]
    assert together.micro_batches([0, 1], Group(), 2 * budget) == [(0, 1, 2, 3, 4, 5)]
