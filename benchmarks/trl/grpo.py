"""`python -m benchmarks.trl.grpo WORK RESULT`, in TRL's environment: runs and times GRPO steps of TRL.

WORK is a JSON file {"work": Work, "settings": TrlSettings}; RESULT is the JSON file of Measured to write.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from actors.machine.allocator import keep_large_blocks
from actors.rewards.rules import length_target
from benchmarks.trl.work import Measured, TrlSettings, Work


def main(work_file: Path, result_file: Path) -> None:
    keep_large_blocks()  # as our actors do
    told = json.loads(work_file.read_text(encoding="utf-8"))
    measured = run(Work(**told["work"]), TrlSettings(**told["settings"]))
    result_file.write_text(json.dumps(asdict(measured)), encoding="utf-8")


def run(work: Work, settings: TrlSettings) -> Measured:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=work.model,
            reward_funcs=reward,
            args=trainer_config(work, settings, folder),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in work.prompts]),
            peft_config=adapters(settings.lora_rank),
        )
        trainer._generate_single_turn = clock.timed(trainer._generate_single_turn)
        trainer.train()
    bounds = [*clock.began, perf_counter()]
    logged = [line for line in trainer.state.log_history if "reward" in line]
    return Measured(
        [end - begin for begin, end in pairwise(bounds)],
        [end - begin for begin, end in zip(clock.began, clock.ended, strict=True)],
        [line["completions/mean_length"] for line in logged],
        [line["reward"] for line in logged],
    )


def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    return [length_target(prompt, text, {}) for prompt, text in zip(prompts, completions, strict=True)]


def adapters(rank: int) -> LoraConfig | None:
    """On the layers that ours adapts: all linear ones of the decoder."""
    if not rank:
        return None
    return LoraConfig(r=rank, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer_config(work: Work, settings: TrlSettings, folder: str) -> GRPOConfig:
    accumulated = work.samples_per_minibatch // settings.micro_batch_samples
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        model_init_kwargs={"dtype": settings.masters},
        bf16=settings.masters == "float32" and settings.autocast,
        # One generation for all minibatches of a step, as ours.
        per_device_train_batch_size=settings.micro_batch_samples,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=work.minibatches * accumulated,
        num_generations=work.samples_per_prompt,
        num_iterations=work.epochs,
        max_steps=work.steps * work.optimizer_steps,
        max_completion_length=work.max_new_tokens,
        temperature=1.0,
        beta=work.kl_coefficient,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        logging_steps=work.optimizer_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=1,
    )


class Clock:
    """Records the start and end of each generation; a step lasts from one start to the next."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.ended: list[float] = []

    def timed(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            self.began.append(perf_counter())
            generated = generate(*args, **kwargs)
            self.ended.append(perf_counter())
            return generated

        return timing


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
