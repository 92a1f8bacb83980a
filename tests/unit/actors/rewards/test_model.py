"""The reward model's score equals the classifier's, for tokens and text, in any batch."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from actors.models.reward_heads import HEADS_ENTRY
from actors.rewards.model import STATS_FILE, RewardModel, read_stats, write_stats
from actors.text.conversations import CHAT_FILE, Chat, chat_of, reward_chat
from orchestrator.data.records import Message
from orchestrator.errors import DataError
from orchestrator.schema import STATES
from tests.tiny import CHATML, tiny_scorer, tiny_tokenizer
from tests.unit.actors.rewards.rollouts import rollout_table

OTHER = CHATML.replace("<|im_end|>", "</s>")
MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
]
RESPONSES = ["Because.", "No idea at all, but the sky is blue and the sea is wide.", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scorer(tmp_path_factory.mktemp("scorer"))


def model(folder: Path, policy_tokenizer: Any = None, **options: Any) -> RewardModel:
    arguments = {"micro_batch_tokens": 4096, "normalise": False, **options}
    return RewardModel(
        folder,
        chat_of(policy_tokenizer or tiny_tokenizer()),
        dtype=torch.float32,
        device=torch.device("cpu"),
        **arguments,
    )


def classifier_scores(folder: Path, token_lists: list[list[int]]) -> list[float]:
    return [score for (score,) in classifier_heads(folder, token_lists)]


def classifier_heads(folder: Path, token_lists: list[list[int]]) -> list[list[float]]:
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    scores = []
    for ids in token_lists:
        with torch.no_grad():
            hidden = classifier.model(torch.tensor([ids])).last_hidden_state[0, -1]
            scores.append(classifier.score(hidden).tolist())
    return scores


def table(closing: bool) -> Any:
    """Responses like an engine's; without `closing`, truncated."""
    chat = chat_of(tiny_tokenizer())
    messages = [Message(**message) for message in MESSAGES]
    transcripts = [chat.reply(messages, response) for response in RESPONSES]
    ends = None if closing else -1
    return rollout_table(
        RESPONSES,
        metas=[{"messages": MESSAGES}] * 3,
        prompt_tokens=[t.prompt_tokens.tolist() for t in transcripts],
        response_tokens=[t.response_tokens.tolist()[:ends] for t in transcripts],
    )


def expected_tokens(template: str) -> list[list[int]]:
    tokenizer = tiny_tokenizer(chat_template=template)
    conversations = [[*MESSAGES, {"role": "assistant", "content": response}] for response in RESPONSES]
    texts = [tokenizer.apply_chat_template(c, tokenize=False).rstrip() for c in conversations]
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert all(text.startswith(prompt) for text in texts)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return [encode(prompt) + encode(text[len(prompt) :]) for text in texts]


def test_sampled_tokens_are_scored_as_they_are(folder: Path) -> None:
    reward_model = model(folder)
    assert reward_model.takes_tokens
    scores = [score.value for score in reward_model.scores(table(closing=True))]
    assert scores == pytest.approx(classifier_scores(folder, expected_tokens(CHATML)), abs=1e-5)
    assert len(set(scores)) == 3


def test_a_response_cut_by_length_is_closed_before_it_is_scored(folder: Path) -> None:
    whole = [score.value for score in model(folder).scores(table(closing=True))]
    assert [score.value for score in model(folder).scores(table(closing=False))] == pytest.approx(whole, abs=1e-6)


def test_another_template_gets_text_under_its_own(folder: Path) -> None:
    reward_model = model(folder, tiny_tokenizer(chat_template=OTHER))
    assert not reward_model.takes_tokens
    scores = [score.value for score in reward_model.scores(table(closing=True))]
    assert scores == pytest.approx(classifier_scores(folder, expected_tokens(CHATML)), abs=1e-5)


def test_scores_do_not_depend_on_the_micro_batch(folder: Path) -> None:
    one_by_one = model(folder, micro_batch_tokens=1).scores(table(closing=True))
    together = model(folder).scores(table(closing=True))
    assert [s.value for s in one_by_one] == pytest.approx([s.value for s in together], abs=1e-6)


def test_long_transcripts_lose_their_start(folder: Path) -> None:
    last = [ids[-6:] for ids in expected_tokens(CHATML)]
    scores = model(folder, max_length=6).scores(table(closing=True))
    assert [s.value for s in scores] == pytest.approx(classifier_scores(folder, last), abs=1e-5)


@pytest.mark.parametrize("template", [CHATML, OTHER])
def test_what_a_transcript_loses_is_counted(folder: Path, template: str) -> None:
    """For sampled tokens and for text."""
    lengths = [len(ids) for ids in expected_tokens(CHATML)]
    limit = sorted(lengths)[1]
    scores = model(folder, tiny_tokenizer(chat_template=template), max_length=limit).scores(table(closing=True))
    assert [score.tokens_cut for score in scores] == [max(length - limit, 0) for length in lengths]
    assert sum(score.tokens_cut > 0 for score in scores) == 1
    assert [score.tokens_cut for score in model(folder).scores(table(closing=True))] == [0, 0, 0]


def test_a_reward_model_takes_what_its_window_takes_and_no_more(tmp_path: Path) -> None:
    folder = tiny_scorer(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    limit = min(len(ids) for ids in expected_tokens(CHATML))
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": limit}))
    for given in (None, 10 * limit):
        scores = model(folder, max_length=given).scores(table(closing=True))
        assert [score.tokens_cut for score in scores] == [len(ids) - limit for ids in expected_tokens(CHATML)]


def test_normalising_uses_the_recorded_statistics_and_keeps_the_raw_score(tmp_path: Path) -> None:
    folder = tiny_scorer(tmp_path)
    raw = [score.value for score in model(folder).scores(table(closing=True))]
    stats = write_stats(folder, [1.0, 3.0, 5.0])
    assert (stats.mean, stats.std, stats.count) == (3.0, 2.0, 3)
    scores = model(folder, normalise=True).scores(table(closing=True))
    assert [score.value for score in scores] == pytest.approx([(value - 3.0) / 2.0 for value in raw])
    assert [score.parts["model"] for score in scores] == pytest.approx(raw)


def test_the_score_of_several_heads_is_their_mean_and_their_deviation_is_a_part(tmp_path: Path) -> None:
    folder = tiny_scorer(tmp_path, heads=3)
    write_stats(folder, [1.0, 3.0, 5.0])
    heads = classifier_heads(folder, expected_tokens(CHATML))
    assert [len(of_heads) for of_heads in heads] == [3, 3, 3]
    scores = model(folder, normalise=True).scores(table(closing=True))
    means = [statistics.fmean(of_heads) for of_heads in heads]
    assert [score.value for score in scores] == pytest.approx([(mean - 3.0) / 2.0 for mean in means], abs=1e-5)
    assert [score.parts["model"] for score in scores] == pytest.approx(means, abs=1e-5)
    expected = [statistics.pstdev(of_heads) for of_heads in heads]
    assert [score.parts["disagreement"] for score in scores] == pytest.approx(expected, abs=1e-5)
    assert min(expected) > 1e-3
    assert all(list(score.parts) == ["model"] for score in model(tiny_scorer(tmp_path / "one")).scores(table(True)))


@pytest.mark.parametrize("heads", [1, 3])
def test_states_are_what_the_heads_read(tmp_path: Path, heads: int) -> None:
    folder = tiny_scorer(tmp_path, heads=heads)
    samples = table(closing=True)
    found = model(folder).states(samples)
    assert found.schema.equals(STATES) and found["row"].to_pylist() == samples["row"].to_pylist()
    assert found["prompt_id"].to_pylist() == ["p"] * 3 and found["error"].null_count == 3
    expected = classifier_heads(folder, expected_tokens(CHATML))
    assert np.array(found["heads"].to_pylist()) == pytest.approx(np.array(expected), abs=1e-5)
    states = np.array(found["state"].to_pylist())
    weight = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).score.weight
    assert states.shape == (3, 64)
    assert states @ weight.detach().numpy().T == pytest.approx(np.array(expected), abs=1e-5)


def test_a_sample_without_a_state_says_why(tmp_path: Path) -> None:
    folder = tiny_scorer(tmp_path, heads=2)
    refusing = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML
    tiny_tokenizer(chat_template=refusing).save_pretrained(folder)
    found = model(folder).states(table(closing=True)).to_pylist()
    assert all(row["heads"] is None and row["state"] is None and "one turn only" in row["error"] for row in found)
    broken = model(tiny_scorer(tmp_path / "broken", heads=2))
    with torch.no_grad():
        broken._model.head.weight.fill_(math.inf)
    assert all("not finite" in str(error) for error in broken.states(table(closing=True))["error"].to_pylist())


def test_a_classifier_with_several_labels_is_no_ensemble(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be loaded"):
        model(tiny_scorer(tmp_path, labels=3))


@pytest.mark.parametrize("entry", [0, -1, 2.5, True, "3", None])
def test_a_damaged_number_of_heads_is_named(tmp_path: Path, entry: Any) -> None:
    settings = json.loads((tiny_scorer(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {HEADS_ENTRY: entry}))
    with pytest.raises(DataError, match=rf"{HEADS_ENTRY} must be a number of heads, found"):
        model(tmp_path)


def test_a_non_finite_score_fails_its_sample(tmp_path: Path) -> None:
    reward_model = model(tiny_scorer(tmp_path))
    with torch.no_grad():
        reward_model._model.head.weight.fill_(math.inf)
    scores = reward_model.scores(table(closing=True))
    assert [score.value for score in scores] == [None] * 3
    assert all("the reward model's score is" in str(score.error) for score in scores)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "has no reward_stats.json"),
        ("", "must hold mean, std and count"),
        ("{}", "must hold mean, std and count"),
        (json.dumps({"mean": 0, "std": 0, "count": 0}), "unusable .*count 0"),
        (json.dumps({"mean": 0, "std": 0.0, "count": 9}), "unusable"),
        ('{"mean": NaN, "std": 1, "count": 9}', "unusable"),
    ],
)
def test_missing_or_empty_statistics_are_data_errors(tmp_path: Path, content: str | None, fault: str) -> None:
    if content is not None:
        (tmp_path / STATS_FILE).write_text(content)
    with pytest.raises(DataError, match=fault):
        read_stats(tmp_path)


@pytest.mark.parametrize("scores", [[], [1.0], [2.0, 2.0], [1.0, math.nan]])
def test_useless_scores_are_not_recorded(tmp_path: Path, scores: list[float]) -> None:
    with pytest.raises(DataError, match="unusable"):
        write_stats(tmp_path, scores)
    assert not (tmp_path / STATS_FILE).exists()


def test_a_tokenizer_without_template_borrows_the_policys_only_with_the_same_vocabulary(tmp_path: Path) -> None:
    folder = tiny_scorer(tmp_path)
    bare = tiny_tokenizer()
    bare.chat_template = None
    (folder / "chat_template.jinja").unlink()
    bare.save_pretrained(folder)
    assert model(folder).takes_tokens
    larger = tiny_tokenizer()
    larger.add_tokens(["<extra>"])
    with pytest.raises(DataError, match="no chat template and another vocabulary"):
        model(folder, larger)


def trained(tmp_path: Path, **settings: Any) -> tuple[Path, Chat]:
    """A reward model like that of the reward_model stage, and its chat format in training."""
    folder = tiny_scorer(tmp_path)
    chat = chat_of(tiny_tokenizer(), **settings)
    chat.save(folder)
    return folder, chat


def scores_of(reward_model: RewardModel) -> list[float | None]:
    return [score.value for score in reward_model.scores(table(closing=True))]


def test_a_reward_model_is_scored_with_the_system_prompt_of_its_training(tmp_path: Path) -> None:
    folder, chat = trained(tmp_path, system_prompt="Judge kindly.")
    messages = [Message(**message) for message in MESSAGES]
    expected = classifier_scores(folder, [chat.reply(messages, text).tokens.tolist() for text in RESPONSES])
    reward_model = model(folder)
    assert not reward_model.takes_tokens
    assert scores_of(reward_model) == pytest.approx(expected, abs=1e-5)
    assert scores_of(reward_model) != pytest.approx(scores_of(model(tiny_scorer(tmp_path / "plain"))), abs=1e-3)


def test_a_reward_model_that_tells_nothing_of_its_training_gets_the_runs_system_prompt(tmp_path: Path) -> None:
    folder = tiny_scorer(tmp_path)
    policy = chat_of(tiny_tokenizer(chat_template=OTHER), system_prompt="Be kind.")
    chat = chat_of(tiny_tokenizer(), system_prompt="Be kind.")
    messages = [Message(**message) for message in MESSAGES]
    expected = classifier_scores(folder, [chat.reply(messages, text).tokens.tolist() for text in RESPONSES])
    found = RewardModel(
        folder,
        policy,
        dtype=torch.float32,
        device=torch.device("cpu"),
        micro_batch_tokens=4096,
        normalise=False,
    )
    assert scores_of(found) == pytest.approx(expected, abs=1e-5)


def test_the_same_training_takes_tokens(tmp_path: Path) -> None:
    assert model(trained(tmp_path)[0]).takes_tokens


DAYS = (date(2025, 1, 1), date(2026, 1, 1))
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


def test_the_date_of_its_training_is_kept(tmp_path: Path) -> None:
    folder = tiny_scorer(tmp_path)
    tiny_tokenizer(chat_template=DATED).save_pretrained(folder)
    then, now = (chat_of(tiny_tokenizer(chat_template=DATED), today=day) for day in DAYS)
    then.save(folder)
    kept = reward_chat(folder, now)
    assert kept.prompt_text((Message("user", "Hi"),)).startswith("01 Jan 2025")
    assert kept.fingerprint == then.fingerprint != now.fingerprint


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"system_prompt": null, "today": "x", "closing": [0], "stops": [0]}']
)
def test_a_damaged_record_of_the_training_is_a_data_error(tmp_path: Path, content: str) -> None:
    folder, _ = trained(tmp_path)
    (folder / CHAT_FILE).write_text(content)
    with pytest.raises(DataError, match="must hold system_prompt, today, closing and stops"):
        model(folder)


def test_a_reply_that_ended_at_another_stop_gets_one_closing(folder: Path) -> None:
    """A policy whose tokenizer names `</s>` also stops there; the reward model learned `<|im_end|>`."""
    ended = table(closing=False)
    stop = tiny_tokenizer().convert_tokens_to_ids("</s>")
    responses = [[*ids, stop] for ids in ended["response_tokens"].to_pylist()]
    place = ended.schema.get_field_index("response_tokens")
    ended = ended.set_column(place, ended.schema.field(place), pa.array(responses, pa.list_(pa.int32())))
    keeps = chat_of(tiny_tokenizer(eos_token="</s>"))
    other = Path(shutil.copytree(folder, folder.parent / "stops", dirs_exist_ok=True))
    keeps.save(other)
    found = RewardModel(
        other, keeps, dtype=torch.float32, device=torch.device("cpu"), micro_batch_tokens=4096, normalise=False
    )
    assert found.takes_tokens
    whole = classifier_scores(folder, expected_tokens(CHATML))
    assert [score.value for score in found.scores(ended)] == pytest.approx(whole, abs=1e-5)


def test_ids_beyond_the_embeddings_go_in_as_text(folder: Path) -> None:
    beyond = table(closing=True)
    responses = [[*ids[:-1], 100_000, ids[-1]] for ids in beyond["response_tokens"].to_pylist()]
    place = beyond.schema.get_field_index("response_tokens")
    beyond = beyond.set_column(place, beyond.schema.field(place), pa.array(responses, pa.list_(pa.int32())))
    whole = classifier_scores(folder, expected_tokens(CHATML))
    assert [score.value for score in model(folder).scores(beyond)] == pytest.approx(whole, abs=1e-5)


def test_a_conversation_that_its_template_refuses_fails_that_sample(tmp_path: Path) -> None:
    folder = tiny_scorer(tmp_path)
    refusing = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML
    tiny_tokenizer(chat_template=refusing).save_pretrained(folder)
    scores = model(folder).scores(table(closing=True))
    assert [score.value for score in scores] == [None] * 3
    assert all("one turn only" in str(score.error) for score in scores)
