"""A training of TRL's on tokens that both sides get, in TRL's environment: benchmarks/trl_training.py.

The rows come in the order in which ours learns them, and every step has our learning rate.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from actors.machine.allocator import keep_large_blocks
from benchmarks.trl.work import Training, TrainingMeasured


def main(work_file: Path, result_file: Path) -> None:
    keep_large_blocks()  # as our actors do
    work = Training(**json.loads(work_file.read_text(encoding="utf-8")))
    result_file.write_text(json.dumps(asdict(run(work))), encoding="utf-8")


def run(work: Training) -> TrainingMeasured:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS[work.kind](work, folder)
        optimizer = torch.optim.AdamW(
            trainer.model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        rates = [*work.rates, 0.0]
        trainer.optimizer = optimizer
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates.__getitem__)
        trainer.add_callback(clock)
        trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return TrainingMeasured(logged, [end - begin for begin, end in pairwise(clock.ends)])


def sft(work: Training, folder: str) -> Any:
    return SFTTrainer(work.model, args(SFTConfig, work, folder), train_dataset=Dataset.from_list(list(work.rows)))


def reward_model(work: Training, folder: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(work.padding)
    model = AutoModelForSequenceClassification.from_pretrained(
        work.scorer, dtype=torch.float32, num_labels=1, pad_token_id=work.padding
    )
    return RewardTrainer(
        model,
        args(RewardConfig, work, folder),
        train_dataset=Dataset.from_list(list(work.rows)),
        processing_class=tokenizer,
    )


class _OfTokens(DPOTrainer):  # type: ignore[misc]
    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """The other trainers leave rows of tokens as they are; this one would take them for text."""
        return dataset


def dpo(work: Training, folder: str) -> Any:
    return _OfTokens(
        AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32),
        args=args(DPOConfig, work, folder, precompute_ref_log_probs=True, beta=0.1),
        train_dataset=Dataset.from_list(list(work.rows)),
        processing_class=AutoTokenizer.from_pretrained(work.model),
    )


TRAINERS: Mapping[str, Callable[[Training, str], Any]] = {"sft": sft, "reward_model": reward_model, "preference": dpo}


def args(config: Any, work: Training, folder: str, **keys: Any) -> Any:
    return config(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=work.records_per_batch,
        max_steps=len(work.rates),
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        max_length=None,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **({"model_init_kwargs": {"dtype": "float32"}} if config is SFTConfig else {}),
        **keys,
    )


class Clock(TrainerCallback):  # type: ignore[misc]
    """When training began, and each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.ends:
            self.ends.append(perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(perf_counter())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
