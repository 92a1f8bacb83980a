"""Ensembles of reward heads: trained on one and on two ranks, killed and continued, exported, and read by all users."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from actors.learning import distributed
from actors.learning.distributed import Group
from actors.rewards.model import RewardModel, read_stats
from actors.roles.critic import CriticWorker
from actors.text.conversations import base_chat, load_chat
from actors.training.ranked_tokens import RankedTokens
from actors.training.reward_model import RewardModelTask, RewardTraining, Trained
from actors.training.trainer import Trainer, Training
from actors.training.work import WorkFolder, open_work
from orchestrator.algorithms.ppo import Ppo
from orchestrator.config.losses import Pairwise, Regression
from orchestrator.config.sections import CriticConfig, ModelConfig
from orchestrator.config.trainings import RewardModelConfig
from orchestrator.data.records import Message, RankingRecord, ScoredRecord
from orchestrator.training.ensemble import mean_scores
from tests.numerics.ranks import context, group, run_ranks
from tests.numerics.samples import experience
from tests.rows import store_records
from tests.tiny import tiny_llama

MOODS = ("kind", "plain", "rude")
SEED = 3


class _Killed(Exception):
    pass


class _MortalWork(WorkFolder):
    """Its try is killed after step 7, two steps after a checkpoint."""

    def stepped(self, step: int, metrics: Any) -> None:
        super().stepped(step, metrics)
        if step == 7:
            raise _Killed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


def rankings(numbers: Sequence[int]) -> list[RankingRecord]:
    return [
        RankingRecord(
            f"p{number}",
            (Message("user", f"Say something about number {number}."),),
            tuple(f"It is {number * 7 % 13}, {mood}" for mood in MOODS),
            scores=(2.0, 1.5, 0.0) if number % 2 else (),
        )
        for number in numbers
    ]


def stage(**keys: Any) -> RewardModelConfig:
    settings = {"heads": 3, "learning_rate": 3e-3, "records_per_batch": 3, "max_length": 64, "epochs": 2}
    return RewardModelConfig(**{**settings, "checkpoint_every_steps": 6, **keys})


def train(
    mine: Group, base: Path, place: Path, section: RewardModelConfig, data: Any, kind: type[WorkFolder] = WorkFolder
) -> Trained:
    """One rank of a training; continues what is in `place`."""
    steps = section.num_steps(len(data[0]))
    settings = RewardTraining(
        section, ModelConfig(path=str(base), dtype="float32"), None, base, place / "model", place / "work", steps, SEED
    )
    if mine.rank == 0:
        open_work(settings.work, "one training")
    distributed.join(mine)
    torch.distributed.barrier()
    make = partial(RewardModelTask, settings)
    training = Training("reward_model", make, section, SEED, settings.work, 1, 1, mine.timeout_s)
    chat = base_chat(base, base, settings.policy, None)
    tokens = (
        RankedTokens(chat, section.max_length, heads=section.heads, seed=SEED),
        RankedTokens(chat, section.max_length),
    )
    rows = asyncio.run(store_records(*data, tokens, place / f"rows-{mine.rank}"))
    work = kind(settings.work, "writer")
    if mine.rank == 0:
        work.claim()
    torch.distributed.barrier()
    return Trainer(training, rows.folders, mine, work).run()


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    place = tmp_path_factory.mktemp("trained")
    return place, train(group(), base, place, stage(loss=Pairwise(margin=0.5)), DATA)


DATA = (rankings(range(18)), rankings(range(18, 24)))


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model" / "model.safetensors")


def test_each_head_learns_the_order_in_its_own_way(trained: tuple[Path, Trained], base: Path, tmp_path: Path) -> None:
    _, found = trained
    heads_BH = np.array([of_reply for replies in found.held_out_heads for of_reply in replies])
    assert heads_BH.shape == (6 * 3, 3)
    assert mean_scores(heads_BH).tolist() == [score for replies in found.held_out_scores for score in replies]
    for replies_KH in heads_BH.reshape(6, 3, 3):
        assert (np.diff(replies_KH.mean(-1)) < 0).all()
    assert np.abs(np.corrcoef(heads_BH.T) - 1).max() > 1e-3


def test_a_killed_training_ends_with_the_same_bits(trained: tuple[Path, Trained], base: Path, tmp_path: Path) -> None:
    section = stage(loss=Pairwise(margin=0.5))
    with pytest.raises(_Killed):
        train(group(), base, tmp_path, section, DATA, _MortalWork)
    assert not (tmp_path / "model").exists()
    again = train(group(), base, tmp_path, section, DATA)
    assert again == trained[1]
    expected = weights(trained[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path).items())


def test_two_ranks_learn_what_one_learns(trained: tuple[Path, Trained], base: Path, tmp_path: Path) -> None:
    section = stage(loss=Pairwise(margin=0.5), zero_stage=3, micro_batch_tokens=300)
    first, second = run_ranks(train, 2, base, tmp_path, section, DATA)
    assert first == second
    found, expected = (np.array(result.held_out_heads) for result in (first, trained[1]))
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, weights(trained[0])[name], rtol=0, atol=2e-3)


def test_transformers_reloads_the_folder_and_scores_are_the_mean(trained: tuple[Path, Trained]) -> None:
    place, found = trained
    folder = place / "model"
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert theirs.config.num_labels == 3 and theirs.score.weight.shape == (3, 64)
    chat = load_chat(folder)
    ours = RewardModel(
        folder, chat, dtype=torch.float32, device=torch.device("cpu"), micro_batch_tokens=512, normalise=True
    )
    record = DATA[1][0]
    transcripts = [chat.reply(record.messages, reply) for reply in record.replies]
    padded = chat.tokenizer.pad({"input_ids": [t.tokens.tolist() for t in transcripts]}, return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**padded).logits
    assert ours.head_scores(transcripts) == pytest.approx(logits.numpy(), abs=1e-4)
    assert ours.head_scores(transcripts).mean(1) == pytest.approx(found.held_out_scores[0], abs=1e-4)
    stats = read_stats(folder)
    assert stats == found.stats and stats.count == 18 * 3


def test_the_critic_starts_from_the_mean_of_the_heads(trained: tuple[Path, Trained]) -> None:
    folder = trained[0] / "model"
    worker = CriticWorker(CriticConfig(path=str(folder)), context(folder, Ppo(), dtype="float32"), group())
    table = experience(seed=1)
    values = worker.values(table)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    columns = (table[name].to_pylist() for name in ("prompt_tokens", "response_tokens"))
    for prompt, response, found, last in zip(
        *columns, values["values"].to_pylist(), values["bootstrap_value"].to_pylist(), strict=True
    ):
        with torch.no_grad():
            hidden = theirs.model(torch.tensor([prompt + response])).last_hidden_state[0]
            means = theirs.score(hidden).mean(-1)[len(prompt) - 1 :].tolist()
        assert [*found, last] == pytest.approx(means, abs=1e-4)


def test_a_trained_ensemble_is_trained_on_or_folded_into_one_head(
    trained: tuple[Path, Trained], tmp_path: Path
) -> None:
    folder = shutil.copytree(trained[0] / "model", tmp_path / "ensemble")
    for heads in (3, 1):
        place = tmp_path / str(heads)
        place.mkdir()
        train(group(), folder, place, stage(heads=heads, epochs=1, learning_rate=1e-9), DATA)
        start, found = (weights(where)["score.weight"] for where in (trained[0], place))
        torch.testing.assert_close(found, start if heads == 3 else start.mean(0, keepdim=True), rtol=0, atol=1e-6)
        theirs = AutoModelForSequenceClassification.from_pretrained(place / "model")
        assert theirs.config.num_labels == heads


def test_scores_of_single_replies_are_learned_by_every_head(base: Path, tmp_path: Path) -> None:
    records = [
        ScoredRecord(record.id, record.messages, reply, 2.0 * place)
        for record in rankings(range(18))
        for place, reply in enumerate(record.replies)
    ]
    found = train(
        group(), base, tmp_path, stage(loss=Regression(), records_per_batch=9, epochs=4), (records, records[:9])
    )
    heads_BH = np.array([of_reply for replies in found.held_out_heads for of_reply in replies])
    for scores_B in heads_BH.T:
        assert np.corrcoef(scores_B, [record.score for record in records[:9]])[0, 1] > 0.8
