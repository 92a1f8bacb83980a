"""TRL gets the tokens that ours learns."""

from __future__ import annotations

from actors.text.conversations import chat_of
from benchmarks.trl.ours import records_of, tokens_of
from benchmarks.trl_training import speeds
from tests.tiny import tiny_tokenizer

CHAT = chat_of(tiny_tokenizer())


def test_both_sides_learn_the_same_tokens() -> None:
    records = records_of(3)
    rows = {kind: tokens_of(kind, records, CHAT, 2000) for kind in ("sft", "reward_model", "preference")}
    for number, record in enumerate(records):
        better, worse = (CHAT.reply(record.messages, reply) for reply in record.replies)
        found = rows["preference"][number]
        assert found["prompt_ids"] == better.prompt_tokens.tolist() == worse.prompt_tokens.tolist()
        assert (found["chosen_ids"], found["rejected_ids"]) == tuple(
            transcript.response_tokens.tolist() for transcript in (better, worse)
        )
        scored = rows["reward_model"][number]
        assert (scored["chosen_ids"], scored["rejected_ids"]) == (better.tokens.tolist(), worse.tokens.tolist())
        learned = [token for token in rows["sft"][number]["labels"] if token != -100]
        assert rows["sft"][number]["input_ids"] == better.tokens.tolist()
        assert learned == better.response_tokens.tolist()


def test_the_first_steps_warm_up() -> None:
    steps = [{"tokens": 10.0 * (number + 1)} for number in range(4)]
    assert speeds(steps, [9.0, 9.0, 2.0, 4.0]) == [15.0, 10.0]
