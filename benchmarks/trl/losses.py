"""Losses of ours and of TRL on the same model and batch, in fp32, in TRL's environment: benchmarks/trl_losses.py.

TRL's trainer tokenises the pairs and gives the loss of one batch. Ours gets the same tokens, packed as in training and
cut into two micro-batches, and adds them up.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from actors.learning.distributed import Group
from actors.learning.heads import PolicyModel, ValueModel
from actors.learning.objectives.losses import LossTerms, likelihood_loss
from actors.learning.objectives.preference import (
    PREFERENCE_OBJECTIVES,
    BatchNumbers,
    kto_kl,
    mismatched,
    replies_of,
)
from actors.learning.objectives.reward import REWARD_OBJECTIVES, Judgements
from actors.learning.packing import MicroBatch, TokenRows
from actors.models.model import load_causal, load_scorer
from actors.training.ranked_rows import RankedRows, first_rows
from actors.training.ranked_tokens import mismatched_table, with_prompts_learned
from orchestrator.config.losses import Cpo, Dpo, Ipo, Kto, Orpo, Pairwise, PreferenceLoss, Simpo

PAIRS = (
    ("What is the capital of France?\n", "It is Paris, on the Seine.", "I don't know."),
    ("Add two and three.\n", "Five.", "The sum of two and three is six, as everybody knows."),
    ("Say hello in Chinese.\n", "你好！很高兴认识你。", "Hola."),
    ("Name a colour.\n", "Blue", "A colour, you say? There are so many that I would rather not choose."),
    ("Why is the sky blue? Answer in one sentence.\n", "Air scatters short waves more than long ones.", "Because."),
    ("Finish: once upon a time\n", "there was a small house by the sea.", "time upon a once"),
)
LABELS = (True, False, True, True, False, False)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loss:
    """One loss under both; equal up to rounding."""

    name: str
    ours: float
    trl: float


@dataclass(frozen=True)
class Models:
    """Folders of a small policy, of a reference with other weights, and of a scorer."""

    policy: Path
    reference: Path
    scorer: Path


def main(tokenizer: Path, result_file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        models = small_models(tokenizer, Path(folder))
        found = [compare(models) for compare in COMPARISONS]
    result_file.write_text(json.dumps([asdict(loss) for losses in found for loss in losses]), encoding="utf-8")


def small_models(base: Path, folder: Path) -> Models:
    """Of the architecture and with the tokenizer of `base`: two layers, random weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = "<|endoftext|>"  # not the EOS, which ends every reply here
    found = Models(folder / "policy", folder / "reference", folder / "scorer")
    for seed, (path, loader, more) in enumerate(
        (
            (found.policy, AutoModelForCausalLM, {}),
            (found.reference, AutoModelForCausalLM, {}),
            (found.scorer, AutoModelForSequenceClassification, {"num_labels": 1}),
        )
    ):
        config = AutoConfig.from_pretrained(
            base, **sizes, num_key_value_heads=2, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id, **more
        )
        torch.manual_seed(seed)
        loader.from_config(config, dtype=torch.float32).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return found


def sft(models: Models) -> list[Loss]:
    pairs = [{"prompt": prompt, "completion": reply} for prompt, reply, _ in PAIRS]
    trainer = SFTTrainer(str(models.policy), args(SFTConfig), train_dataset=Dataset.from_list(pairs))
    found = [
        (
            [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100],
            [label for label in row["labels"] if label != -100],
        )
        for row in trainer.train_dataset
    ]
    ranked = ranked_rows(rows_of(found, records=range(len(found)), qualities=[0.0] * len(found)))
    count = float(ranked.rows.learned_lengths.sum())
    model = PolicyModel(load_causal(models.policy, torch.float32), temperature=1.0)
    ours = total(ranked, model, lambda output, _: likelihood_loss(output[0])) / count
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(models.policy, dtype=torch.float32)(**batch).loss
    return [Loss("SFT", ours, theirs(trainer)), Loss("SFT, transformers' own loss", ours, float(reference))]


def reward_model(models: Models) -> list[Loss]:
    found = []
    for section, name in ((Pairwise(), "reward model"), (Pairwise(centring=0.1), "reward model, centring 0.1")):
        trainer = RewardTrainer(
            AutoModelForSequenceClassification.from_pretrained(models.scorer, dtype=torch.float32),
            args(RewardConfig, center_rewards_coefficient=section.centring or None),
            train_dataset=pair_dataset(margin=None),
            processing_class=AutoTokenizer.from_pretrained(models.scorer),
        )
        found.append(Loss(name, our_scores(models, trainer, section), theirs(trainer)))
    section = Pairwise(margin=0.5)
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(models.scorer, dtype=torch.float32),
        args(RewardConfig),
        train_dataset=pair_dataset(margin=0.5),
        processing_class=AutoTokenizer.from_pretrained(models.scorer),
    )
    return [*found, Loss("reward model, margin 0.5", our_scores(models, trainer, section), theirs(trainer))]


def our_scores(models: Models, trainer: Any, section: Pairwise) -> float:
    pairs = [(row[name][:1], row[name][1:]) for row in trainer.train_dataset for name in ("chosen_ids", "rejected_ids")]
    ranked = ranked_rows(ranked_pairs(pairs))
    model = ValueModel(load_scorer(models.scorer, torch.float32))
    objective = REWARD_OBJECTIVES[section.name]

    def loss(output: Any, micro: MicroBatch) -> LossTerms:
        return objective(section, output[1], Judgements.of(micro.columns))

    return total(ranked, model, loss) / ranked.num_records


def dpo(models: Models) -> list[Loss]:
    found = []
    for section, kind in ((Dpo(beta=0.3), "sigmoid"), (Ipo(beta=0.3), "ipo")):
        trainer = DPOTrainer(
            str(models.policy),
            ref_model=AutoModelForCausalLM.from_pretrained(models.reference, dtype=torch.float32),
            args=args(DPOConfig, loss_type=[kind], beta=section.beta),
            train_dataset=pair_dataset(margin=None),
        )
        pairs = [
            (row["prompt_ids"], row[name]) for row in trainer.train_dataset for name in ("chosen_ids", "rejected_ids")
        ]
        found.append(Loss(section.name, our_preference(models, section, ranked_pairs(pairs)), theirs(trainer)))
    return found


def without_reference(models: Models) -> list[Loss]:
    cases: Sequence[tuple[PreferenceLoss, Any, Any]] = (
        (Cpo(beta=0.3, label_smoothing=0.1), CPOTrainer, args(CPOConfig, beta=0.3, label_smoothing=0.1)),
        (
            Simpo(beta=2.0, gamma=0.8),
            CPOTrainer,
            args(CPOConfig, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.8),
        ),
        (Orpo(beta=0.3), ORPOTrainer, args(ORPOConfig, beta=0.3)),
    )
    found = []
    for section, trainer_class, config in cases:
        trainer = trainer_class(
            AutoModelForCausalLM.from_pretrained(models.policy, dtype=torch.float32),
            args=config,
            train_dataset=pair_dataset(margin=None),
            processing_class=AutoTokenizer.from_pretrained(models.policy),
        )
        pairs = [
            (row["prompt_input_ids"], row[f"{name}_input_ids"][len(row["prompt_input_ids"]) :])
            for row in trainer.train_dataset
            for name in ("chosen", "rejected")
        ]
        found.append(Loss(section.name, our_preference(models, section, ranked_pairs(pairs)), theirs(trainer)))
    return found


def kto(models: Models) -> list[Loss]:
    section = Kto(beta=0.3, desirable_weight=1.2, undesirable_weight=0.9)
    rows = [
        {"prompt": prompt, "completion": better if label else worse, "label": label}
        for (prompt, better, worse), label in zip(PAIRS, LABELS, strict=True)
    ]
    trainer = KTOTrainer(
        str(models.policy),
        ref_model=AutoModelForCausalLM.from_pretrained(models.reference, dtype=torch.float32),
        args=args(KTOConfig, beta=section.beta, desirable_weight=1.2, undesirable_weight=0.9),
        train_dataset=Dataset.from_list(rows),
    )
    pairs = [(row["prompt_ids"], row["completion_ids"]) for row in trainer.train_dataset]
    labels = [float(row["label"]) for row in trainer.train_dataset]
    table = rows_of(pairs, records=range(len(pairs)), qualities=labels)
    return [Loss("kto", our_preference(models, section, table), theirs(trainer))]


COMPARISONS: Sequence[Callable[[Models], list[Loss]]] = (sft, reward_model, dpo, without_reference, kto)


def args(config: Any, **keys: Any) -> Any:
    return config(
        output_dir=tempfile.gettempdir(),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=len(PAIRS),
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **keys,
    )


def pair_dataset(margin: float | None) -> Dataset:
    more = {} if margin is None else {"margin": margin}
    return Dataset.from_list(
        [{"prompt": prompt, "chosen": better, "rejected": worse, **more} for prompt, better, worse in PAIRS]
    )


def theirs(trainer: Any) -> float:
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


def our_preference(models: Models, section: PreferenceLoss, table: pa.Table) -> float:
    """As PreferenceTask does it, without workers."""
    ranked = ranked_rows(with_prompts_learned(table) if isinstance(section, Orpo) else table)
    policy = PolicyModel(load_causal(models.policy, torch.float32), temperature=1.0)
    numbers = BatchNumbers()
    if section.needs_reference:
        reference = PolicyModel(load_causal(models.reference, torch.float32), temperature=1.0)
        ranked = ranked.with_reference(np.array(logprobs(ranked.rows, reference), dtype=np.float32))
        if section.judgement == "labels":
            pairs = mismatched(range(ranked.num_records))
            mixed = ranked_rows(mismatched_table(ranked, pairs, max_length=10_000)).rows
            kl = kto_kl(torch.tensor(logprobs(mixed, policy)), torch.tensor(logprobs(mixed, reference)))
            numbers = BatchNumbers(kl=float(kl))
    if section.judgement != "labels":
        tokens = ranked.rows.learned_lengths[list(ranked.first_row[:-1])].sum()
        numbers = BatchNumbers(prompts_per_token=ranked.num_records / float(tokens))
    objective = PREFERENCE_OBJECTIVES[section.name]

    def loss(output: Any, micro: MicroBatch) -> LossTerms:
        replies = replies_of(output[0], micro)
        return objective.terms(section, objective.reward(section, replies), replies, numbers)

    return total(ranked, policy, loss) / ranked.num_records


def logprobs(rows: TokenRows, model: PolicyModel) -> list[float]:
    micro = rows.pack(range(rows.num_rows), CPU)
    with torch.no_grad():
        return replies_of(model(micro)[0], micro).logprob_B.tolist()


def total(ranked: RankedRows, model: Any, loss: Callable[[Any, MicroBatch], LossTerms]) -> float:
    """The sum of a batch, in micro-batches."""
    longest = max(ranked.rows.lengths)
    micros = ranked.micro_batches(range(ranked.num_records), Group(), 4 * longest)
    assert len(micros) > 1
    with torch.no_grad():
        packed = [ranked.rows.pack(rows, CPU) for rows in micros]
        return sum(float(loss(model(micro), micro).loss) for micro in packed)


def ranked_pairs(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> pa.Table:
    """Rows of a better and a worse reply by turns."""
    records = [row // 2 for row in range(len(pairs))]
    return rows_of(pairs, records=records, qualities=[float(-(row % 2)) for row in range(len(pairs))])


def rows_of(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, records: Sequence[int], qualities: Sequence[float]
) -> pa.Table:
    lists = pa.list_(pa.int32())
    columns: Mapping[str, Any] = {
        "prompt_tokens": pa.array([prompt for prompt, _ in rows], lists),
        "response_tokens": pa.array([reply for _, reply in rows], lists),
        "learn": pa.array([[True] * len(reply) for _, reply in rows], pa.list_(pa.bool_())),
        "quality": pa.array(qualities, pa.float32()),
        "strength": pa.array(qualities, pa.float32()),
        "record": pa.array(records, pa.int64()),
    }
    return pa.table(columns)


def ranked_rows(table: pa.Table) -> RankedRows:
    """The rows of a table, in memory."""
    records = table["record"].to_numpy()
    names = [name for name in ("reply", "quality", "strength") if name in table.column_names]
    rows = TokenRows.of_table(table, names, learned_only=True).with_column("group", records.astype(np.float32))
    return RankedRows(rows, first_rows(records))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
