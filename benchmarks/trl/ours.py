"""The trainings of benchmarks/trl_training.py on our side; writes what TRL's needs to learn the same."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM

from actors.learning import distributed
from actors.learning.distributed import Group
from actors.machine.allocator import keep_large_blocks
from actors.models.model import EMBEDDED, load_scorer, resolve_model
from actors.text.conversations import Chat, load_chat
from actors.text.learned import Rows
from actors.text.tokenizing import load_tokenizer
from actors.training.preference import PreferenceTask, PreferenceTraining
from actors.training.ranked_tokens import ADDED, RankedTokens, padding_token
from actors.training.reward_model import RewardModelTask, RewardTraining
from actors.training.sft import SftTask, SftTraining
from actors.training.stored_rows import writing_rows
from actors.training.trainer import Trainer, Training
from actors.training.work import WorkFolder, open_work
from benchmarks.trl import work
from orchestrator.config.sections import ModelConfig, PromptsConfig, RunConfig
from orchestrator.config.trainings import PreferenceConfig, RewardModelConfig, SftConfig
from orchestrator.data.kinds import PROMPTS
from orchestrator.data.readers import read_all
from orchestrator.data.records import Message, RankingRecord
from orchestrator.training.ranking import epoch_batches
from orchestrator.training.schedule import learning_rate

SEED = 1
LONGEST_REPLY = 12  # texts
KEYS: Mapping[str, Any] = {"max_length": 384, "micro_batch_tokens": 2048, "checkpoint_every_steps": 0}
SECTIONS: Mapping[str, Any] = {
    "sft": SftConfig(**KEYS, records_per_batch=8, learning_rate=2e-5),
    "reward_model": RewardModelConfig(**KEYS, records_per_batch=4, learning_rate=1e-5),
    "preference": PreferenceConfig(**KEYS, records_per_batch=4, learning_rate=1e-5),
}


def main(kind: str, num_steps: int, layers: int, folder: Path) -> None:
    """Trains in `folder`/work, and writes `folder`/work.json for TRL. `layers`: of the start model, the first ones."""
    keep_large_blocks()
    section = SECTIONS[kind]
    base, scorer = resolve_model(EMBEDDED, RunConfig().cache), folder / "scorer"
    policy = ModelConfig(path=str(folder / "policy"), dtype="float32")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, num_hidden_layers=layers).save_pretrained(
        policy.path
    )
    load_tokenizer(base).save_pretrained(policy.path)
    load_scorer(Path(policy.path), torch.float32, new_head="normal", seed=SEED).save_pretrained(scorer)
    load_tokenizer(base).save_pretrained(scorer)
    chat = load_chat(Path(policy.path), policy)
    records = records_of(num_steps * section.records_per_batch)
    order = [
        number
        for batch in epoch_batches(len(records), records_per_batch=section.records_per_batch, seed=SEED, epoch=0)
        for number in batch
    ]
    tokens = tokens_of(kind, records, chat, section.max_length)
    learner = section.learner(num_steps)
    rates = [
        learning_rate(
            step,
            peak=learner.learning_rate,
            schedule=learner.schedule,
            warmup_optimizer_steps=learner.warmup_optimizer_steps,
            total_optimizer_steps=num_steps,
        )
        for step in range(num_steps)
    ]
    told = work.Training(
        kind=kind,
        model=policy.path,
        scorer=str(scorer),
        padding=padding_token(chat),
        rows=[tokens[number] for number in order],
        records_per_batch=section.records_per_batch,
        rates=rates,
    )
    (folder / "work.json").write_text(json.dumps(asdict(told)), encoding="utf-8")
    train(kind, records, policy, chat, scorer, folder)


def train(
    kind: str, records: Sequence[RankingRecord], policy: ModelConfig, chat: Chat, scorer: Path, folder: Path
) -> None:
    section = SECTIONS[kind]
    threads = len(os.sched_getaffinity(0))
    group = Group(threads=threads)
    distributed.join(group)
    shared: dict[str, Any] = {
        "policy": policy,
        "template": None,
        "cache": RunConfig().cache,
        "folder": folder / "made",
        "work": folder / "work",
        "total_optimizer_steps": section.num_steps(len(records)),
        "seed": SEED,
    }
    makes: Mapping[str, Any] = {
        "sft": lambda: partial(SftTask, SftTraining(stage=section, **shared)),
        "reward_model": lambda: partial(
            RewardModelTask,
            RewardTraining(stage=section.model_copy(update={"base": str(scorer)}), **shared),
        ),
        "preference": lambda: partial(PreferenceTask, PreferenceTraining(stage=section, **shared)),
    }
    open_work(folder / "work", "benchmark")
    data = stored(kind, records, chat, section.max_length, folder)
    claimed = WorkFolder(folder / "work", "benchmark")
    claimed.claim()
    training: Training[Any] = Training(
        role=kind,
        make=makes[kind](),
        passes=section,
        seed=SEED,
        work=folder / "work",
        unexpected_errors=0,
        threads=threads,
        timeout_s=600.0,
    )
    Trainer(training, data, group, claimed).run()


def stored(
    kind: str, records: Sequence[RankingRecord], chat: Chat, max_length: int, folder: Path
) -> tuple[Path | None, ...]:
    """The folders of the rows to train on, of none held out, and none of mismatched ones."""
    found = folder / "train", folder / "held_out"
    for place, some in zip(found, (records, ()), strict=True):
        place.mkdir()
        with writing_rows(place, *(() if kind == "sft" else ADDED)) as writer:
            writer.append(
                sft_rows(some, chat, max_length).table() if kind == "sft" else ranked_table(some, chat, max_length)
            )
    return (*found, None) if kind == "preference" else found


def ranked_table(records: Sequence[RankingRecord], chat: Chat, max_length: int) -> pa.Table:
    tokens = RankedTokens(chat, max_length)
    for record in records:
        tokens.add(record)
    return tokens.take()


def records_of(count: int) -> list[RankingRecord]:
    """Prompts of the quickstart, answered by 1 to 12 other prompts: text, nothing more.

    Lengths vary as in conversations: the mean of 8 rows is 0.6 of the longest. In 8 of OASST's conversations, cut at
    400 words, it is 0.56, in ShareGPT's 0.62.
    """
    prompts, _ = read_all(PROMPTS, PromptsConfig().path)
    texts = [prompt.text for prompt in prompts]

    def reply(number: int, stride: int) -> str:
        num_texts = 1 + number * stride % LONGEST_REPLY
        return " ".join(texts[(number * stride + place) % len(texts)] for place in range(1, num_texts + 1))

    return [
        RankingRecord(str(number), (Message("user", texts[number % len(texts)]),), (reply(number, 7), reply(number, 5)))
        for number in range(count)
    ]


def sft_rows(records: Sequence[RankingRecord], chat: Chat, max_length: int) -> Rows:
    rows = Rows()
    for record in records:
        rows.add(chat, (*record.messages, Message("assistant", str(record.replies[0]))), max_length=max_length)
    return rows


def tokens_of(
    kind: str, records: Sequence[RankingRecord], chat: Chat, max_length: int
) -> list[Mapping[str, Sequence[int]]]:
    """Per record, the tokens under the names of TRL's trainer."""
    if kind == "sft":
        return [
            {"input_ids": row.tokens.tolist(), "labels": np.where(row.learn, row.tokens, -100).tolist()}
            for row in sft_rows(records, chat, max_length).rows
        ]
    table = ranked_table(records, chat, max_length)
    prompts, replies = (table[name].to_pylist() for name in ("prompt_tokens", "response_tokens"))
    pairs = range(0, len(prompts), 2)
    if kind == "reward_model":
        return [{"chosen_ids": prompts[i] + replies[i], "rejected_ids": prompts[i + 1] + replies[i + 1]} for i in pairs]
    return [{"prompt_ids": prompts[i], "chosen_ids": replies[i], "rejected_ids": replies[i + 1]} for i in pairs]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
