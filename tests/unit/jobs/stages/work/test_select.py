"""Selection by hand: what is kept, in which order, and what is counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from actors.environments.process import Episodes
from actors.rewards.environment import EpisodeReward
from actors.text.conversations import chat_of
from actors.text.learned import Rows
from jobs.stages.work.select import _KINDS, Scored, _usable
from orchestrator import schema
from orchestrator.config.sections import SelectConfig
from orchestrator.data.kinds import DEMONSTRATIONS, RANKINGS
from orchestrator.data.readers import read_all
from orchestrator.types import SampleRequest
from tests.tiny import tiny_tokenizer
from tests.unit.actors.environments import test_episodes as played


def sample(prompt: str, reply: str, score: float, *, begun: str = "") -> Scored:
    messages = [{"role": "user", "content": f"Say {prompt}."}]
    if begun:
        messages.append({"role": "assistant", "content": begun})
    return Scored(prompt, json.dumps({"messages": messages}), reply, score)


SAMPLES = [
    sample("a", "bad", 0.0),
    sample("a", "good", 2.0),
    sample("a", "good", 2.0),
    sample("b", "same", 1.0),
    sample("b", "same", 1.0),
    sample("c", "low", -3.0, begun="I say "),
    sample("c", "mid", -2.5, begun="I say "),
    sample("c", "high", -1.0, begun="I say "),
]


def replies(kept: str, **keys: object) -> tuple[list[object], Counter[str]]:
    skipped: Counter[str] = Counter()
    rows = list(_KINDS[kept](SAMPLES, SelectConfig(keep=kept, **keys), skipped))
    return [row.get("replies", row["messages"][-1]["content"]) for row in rows], skipped


def test_the_best_reply_to_each_prompt_is_kept_and_continues_a_begun_turn() -> None:
    found, skipped = replies("best")
    assert found == ["good", "same", "I say high"]
    assert sum(skipped.values()) == 5


def test_the_best_share_is_taken_over_all_prompts_and_keeps_its_order() -> None:
    found, skipped = replies("top", share=0.3)  # 3 of 8
    assert found == ["good", "good", "same"] and sum(skipped.values()) == 5


def test_pairs_are_the_best_and_the_worst_reply() -> None:
    found, skipped = replies("pairs")
    assert found == [["good", "bad"], ["high", "low"]]
    assert skipped == {"of prompts whose replies are equally good": 2}
    found, skipped = replies("pairs", min_margin=2.0)
    assert found == [["good", "bad"], ["high", "low"]]
    found, _ = replies("pairs", min_margin=2.5)
    assert found == []


def test_replies_to_one_prompt_belong_together_wherever_they_are() -> None:
    spread = [SAMPLES[0], SAMPLES[5], SAMPLES[1], SAMPLES[7]]
    rows = list(_KINDS["pairs"](spread, SelectConfig(keep="pairs"), Counter()))
    assert [row["replies"] for row in rows] == [["good", "bad"], ["high", "low"]]


def test_rankings_hold_all_distinct_replies_in_order() -> None:
    found, skipped = replies("rankings")
    assert found == [["good", "bad"], ["high", "mid", "low"]]
    assert skipped == {"of prompts whose replies are equal": 2}


def test_a_score_of_zero_is_data_and_a_cut_reply_is_not_learned() -> None:
    rows = {"prompt_id": ["a"] * 3, "meta": ["{}"] * 3, "response_text": ["x", "y", "z"]}
    table = pa.table(rows | {"finish_reason": ["stop", "stop", "length"]})
    skipped: Counter[str] = Counter()
    found = list(_usable(table, pa.table({"reward": [0.0, None, 5.0]}), skipped))
    assert [(scored.reply, scored.score) for scored in found] == [("x", 0.0)]
    assert skipped == {"without a score": 1, "cut by length": 1}


@pytest.mark.parametrize("kept", ["best", "top", "pairs", "rankings"])
def test_what_is_written_is_read_back(tmp_path: Path, kept: str) -> None:
    rows = list(_KINDS[kept](SAMPLES, SelectConfig(keep=kept, share=1.0), Counter()))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if kept in ("best", "top"):
        demonstrations, _ = read_all(DEMONSTRATIONS, tmp_path / "rows.jsonl")
        assert demonstrations[-1].messages[-1].content == "I say high"
    else:
        rankings, _ = read_all(RANKINGS, tmp_path / "rows.jsonl")
        assert [record.replies[0] for record in rankings] == ["good", "high"]
        assert rankings[1].messages[-1].content == "I say "


def test_the_best_episode_of_each_prompt_is_learned_turn_by_turn(tmp_path: Path) -> None:
    """Rejection sampling with an environment: the rows of sft are the sampled tokens with the marks of the episode."""
    chat = chat_of(tiny_tokenizer())
    turns = {0: ["end"], 1: ["on", "one", "end"], 2: ["on…", "end"], 3: ["end"]}
    heard: dict[int, int] = {}

    def script(item: SampleRequest) -> str:
        heard[item.row] = heard.get(item.row, -1) + 1
        return turns[item.row][heard[item.row]]

    with Episodes(played.OBEDIENT, played.LIMITS) as episodes:
        rows, _, _ = played.play(chat, episodes, script, played.shard(played.requests_of(chat)))
    samples = pa.Table.from_pylist(rows, schema.ROLLOUT)
    scores = [score.value for score in EpisodeReward().scores(samples)]
    assert scores == [0.5, 1.5, 1.0, 0.5]
    skipped: Counter[str] = Counter()
    usable = list(_usable(samples, pa.table({"reward": scores}), skipped))
    found = list(_KINDS["best"](usable, SelectConfig(keep="best"), skipped))
    assert skipped == {"with a turn that was cut by length": 1, "worse than the best reply to their prompt": 1}
    (tmp_path / "selected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    records, report = read_all(DEMONSTRATIONS, tmp_path / "selected.jsonl")
    assert [len(record.messages) for record in records] == [6, 2] and not report.left_out
    assert [turn.role for turn in records[0].messages] == ["user", "assistant"] * 3
    learned = Rows()
    for record in records:
        learned.add(chat, record.messages, record.tools, max_length=512)
    for row, place in zip(learned.rows, (1, 3), strict=True):
        sampled = rows[place]
        assert row.tokens.tolist() == sampled["prompt_tokens"] + sampled["response_tokens"]
        assert row.learn.tolist() == [False] * len(sampled["prompt_tokens"]) + sampled["learn"]


def test_an_episode_of_several_conversations_is_as_many_demonstrations_and_silence_is_left_out() -> None:
    def sample(*conversations: list[dict[str, str]], tools: bool = False) -> str:
        held = [
            {"messages": messages, **({"tools": [{"type": "function"}]} if tools else {})} for messages in conversations
        ]
        return json.dumps({"episode": {"reward": 1.0, "parts": {}, "error": None, "spans": [], "conversations": held}})

    asked, told = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    metas = [sample([asked, told], [asked, told, asked, told], tools=True), sample([{**asked, "content": " "}, told])]
    table = pa.table({"prompt_id": ["p", "q"], "meta": metas, "response_text": [""] * 2, "finish_reason": ["stop"] * 2})
    skipped: Counter[str] = Counter()
    usable = list(_usable(table, pa.table({"reward": [1.0, 1.0]}), skipped))
    assert skipped == {"with an empty turn of the environment": 1}
    found = list(_KINDS["top"](usable, SelectConfig(keep="top", share=1.0), skipped))
    assert [len(row["messages"]) for row in found] == [2, 4]
    assert all(row["tools"] == [{"type": "function"}] and row["score"] == 1.0 for row in found)
