from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.learning.distributed import Group
from actors.text.conversations import chat_of
from actors.training.ranked_rows import RankedRows, mismatched_rows, padding_token, ranked_rows
from orchestrator.data.records import Message, RankingRecord
from tests.tiny import tiny_tokenizer

CHAT = chat_of(tiny_tokenizer())
TOKENIZER = CHAT.tokenizer


def _record(question: str, *replies: str) -> RankingRecord:
    return RankingRecord(question, (Message("user", question),), replies)


def _rows(*num_replies: int, max_length: int = 200) -> RankedRows:
    records = [
        _record("why " * (i + 1), *(f"{'so ' * (k + i)}{k}" for k in range(n))) for i, n in enumerate(num_replies)
    ]
    return ranked_rows(records, CHAT, max_length=max_length)


def test_a_record_owns_its_replies_in_order() -> None:
    ranked = _rows(2, 3)
    assert [list(ranked.rows_of(i)) for i in range(ranked.num_records)] == [[0, 1], [2, 3, 4]]
    assert ranked.table["quality"].to_pylist() == [0, -1, 0, -1, -2]
    assert ranked.table["group"].to_pylist() == [0, 0, 1, 1, 1]


def test_scores_of_a_record_are_its_strengths_and_places_where_it_has_none() -> None:
    scored = replace(_record("Why?", "So.", "No.", "Or."), scores=(2.0, 2.0, 0.5))
    ranked = ranked_rows([_record("Who?", "I.", "You."), scored], CHAT, max_length=200)
    assert ranked.table["strength"].to_pylist() == [0, -1, 2, 2, 0.5]
    assert ranked.table["quality"].to_pylist() == [0, -1, 0, -1, -2]
    assert ranked.rows.pack((3, 4), torch.device("cpu")).columns["strength"].tolist() == [2, 0.5]


def test_a_transcript_within_the_limit_is_what_a_sampled_response_looks_like() -> None:
    record = _record("How far is it?", "Two miles.", "Far.")
    ranked = ranked_rows([record], CHAT, max_length=200)
    for row, reply in enumerate(record.replies):
        transcript = CHAT.reply(record.messages, reply)
        assert ranked.table["prompt_tokens"][row].as_py() == transcript.prompt_tokens.tolist()
        assert ranked.table["response_tokens"][row].as_py() == transcript.response_tokens.tolist()
        assert transcript.response_tokens[-1] == TOKENIZER.eos_token_id
    assert ranked.num_truncated == 0


@pytest.mark.parametrize("max_length", [30, 12, 5, 2])
def test_a_longer_transcript_keeps_its_end_and_is_counted(max_length: int) -> None:
    record = _record("How far is it to the sea from here, please?", "Two miles.", "It is far away.")
    ranked = ranked_rows([record], CHAT, max_length=max_length)
    assert ranked.num_truncated == 2
    for row, reply in enumerate(record.replies):
        whole = CHAT.reply(record.messages, reply).tokens
        prompt, response = (ranked.table[name][row].as_py() for name in ("prompt_tokens", "response_tokens"))
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
    ranked = _rows(*num_replies)
    records = list(range(len(num_replies)))
    plans = [ranked.micro_batches(records, Group(rank, world_size), budget) for rank in range(world_size)]
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(row for plan in plans for micro in plan for row in micro) == list(range(sum(num_replies)))
    owner = [record for record in records for _ in ranked.rows_of(record)]
    for micro in (micro for plan in plans for micro in plan if micro):
        held = {owner[row] for row in micro}
        assert sorted(micro) == sorted(row for record in held for row in ranked.rows_of(record))
        if len(held) > 1:
            assert len(micro) * max(ranked.lengths[row] for row in micro) <= budget


def test_padding_never_ends_a_transcript() -> None:
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    last = CHAT.reply((Message("user", "Hi"),), "Hello").tokens[-1]
    assert padding_token(CHAT) != last
    other = tiny_tokenizer()
    other.pad_token = "</s>"
    assert padding_token(chat_of(other)) == other.pad_token_id


def test_rows_are_packed_with_their_rank_and_record() -> None:
    ranked = _rows(2, 2)
    micro = ranked.rows.pack((2, 3), torch.device("cpu"))
    assert micro.columns["quality"].tolist() == [0, -1]
    assert micro.columns["group"].tolist() == [1, 1]
    ends = micro.input_ids_BT.flatten()[micro.last_index_B]
    assert np.all(ends.numpy() == TOKENIZER.eos_token_id)


def test_log_probs_of_the_reference_go_with_the_rows() -> None:
    ranked = _rows(2, 2).with_reference([-1.0, -2.0, -3.0, -4.0])
    assert ranked.rows.pack((2, 1), torch.device("cpu")).columns["reference"].tolist() == [-3, -2]


def test_a_learned_prompt_is_that_of_the_best_reply_without_its_first_token() -> None:
    plain, ranked = _rows(2, 3), _rows(2, 3).with_prompts_learned()
    assert ranked.lengths == plain.lengths
    for row in range(5):
        prompt, reply = (plain.table[name][row].as_py() for name in ("prompt_tokens", "response_tokens"))
        micro = ranked.rows.pack((row,), torch.device("cpu"))
        assert micro.input_ids_BT.tolist() == [prompt + reply]
        is_best = row in (0, 2)
        assert micro.targets_N.tolist() == (prompt[1:] if is_best else []) + reply
        assert micro.columns["reply"].tolist() == [0.0] * (len(prompt) - 1) * is_best + [1.0] * len(reply)
        assert micro.lengths_B.tolist() == [len(micro.targets_N)]
        assert micro.columns["quality"].tolist() == [plain.table["quality"][row].as_py()]


def test_a_mismatched_row_is_a_prompt_with_the_best_reply_to_another() -> None:
    ranked = _rows(2, 2, 2)
    mixed = mismatched_rows(ranked, [(0, 2), (1, 0)], max_length=200)
    prompts, replies = (ranked.table[name].to_pylist() for name in ("prompt_tokens", "response_tokens"))
    assert mixed.table["prompt_tokens"].to_pylist() == [prompts[0], prompts[2]]
    assert mixed.table["response_tokens"].to_pylist() == [replies[4], replies[0]]
    (short,) = mismatched_rows(ranked, [(0, 2)], max_length=5).lengths
    assert short == 5


def test_replies_share_their_prompt_where_that_is_less_work() -> None:
    record = _record("How far is it to the sea from here, please? " * 3, "Two miles.", "It is far.", "Far.")
    apart = ranked_rows([record, record], CHAT, max_length=400)
    together = replace(apart, shares_prompts=True)
    micro = together.rows.pack(range(6), torch.device("cpu"))
    assert micro.rows == (0, 1, 2, 3, 4, 5)
    assert len(micro.input_ids_BT) < 6 and micro.input_ids_BT.numel() < 6 * max(apart.lengths)
    assert micro.targets_N.tolist() == apart.rows.pack(range(6), torch.device("cpu")).targets_N.tolist()
    budget = together.rows.line_length((0, 1, 2))
    assert together.micro_batches([0, 1], Group(), budget) == [(0, 1, 2), (3, 4, 5)]
    assert together.micro_batches([0, 1], Group(), 2 * budget) == [(0, 1, 2, 3, 4, 5)]
