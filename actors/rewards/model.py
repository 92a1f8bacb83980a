"""A reward model: a sequence classifier that scores a transcript at its last token, with one label or one per head."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actors.learning.heads import ValueModel
from actors.learning.packing import MicroBatch, token_rows
from actors.machine.devices import compute_device
from actors.models.files import window
from actors.models.model import load_scorer, resolve_model, torch_dtype
from actors.models.reward_heads import num_heads
from actors.rewards import DISAGREEMENT, RewardContext, Sample, Score, samples
from actors.text.conversations import Chat, Transcript, load_chat, reward_chat
from orchestrator import schema
from orchestrator.config.rewards import ModelSource
from orchestrator.data.records import messages_from_dicts
from orchestrator.errors import ConfigError, DataError
from orchestrator.planning.balance import micro_batches
from orchestrator.run.storage import write_json
from orchestrator.training.ensemble import disagreement, mean_scores

STATS_FILE = "reward_stats.json"
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RewardStats:
    """Mean and standard deviation of a reward model's scores on a set of replies."""

    mean: float
    std: float
    count: int

    def normalised(self, score: float) -> float:
        return (score - self.mean) / self.std


def write_stats(folder: Path, scores: Sequence[float]) -> RewardStats:
    """Writes the moments of scores to a reward model's folder.

    Raises:
        DataError: fewer than two scores, or all are equal.
    """
    values = np.asarray(scores, dtype=np.float64)
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    stats = RewardStats(float(values.mean()) if len(values) else 0.0, std, len(values))
    _check(stats, folder / STATS_FILE, "Score more replies, or train the reward model for longer.")
    write_json(folder / STATS_FILE, asdict(stats))
    return stats


def read_stats(folder: Path) -> RewardStats:
    """Raises DataError if there are no usable statistics."""
    file = folder / STATS_FILE
    way_out = "Train it with the reward_model stage, which records them, or set reward.normalise=false."
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        stats = RewardStats(float(raw["mean"]), float(raw["std"]), int(raw["count"]))
    except FileNotFoundError:
        raise DataError(f"reward model {folder} has no {STATS_FILE}, so it can't be normalised. {way_out}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} must hold mean, std and count as numbers ({error!r}). {way_out}") from None
    _check(stats, file, way_out)
    return stats


def _check(stats: RewardStats, file: Path, way_out: str) -> None:
    if stats.count < 2 or not math.isfinite(stats.mean) or not math.isfinite(stats.std) or stats.std <= 0:
        raise DataError(
            f"reward statistics for {file} are unusable (mean {stats.mean}, std {stats.std}, count {stats.count}): "
            f"at least two different, finite scores are needed. {way_out}"
        )


class RewardModel:
    """Args:
        folder: a sequence classifier with its tokenizer and, for `normalise`, its statistics.
        policy: the policy's chat format. If the reward model's is equal, it reads the sampled tokens; otherwise it
            reads text, formatted as in its training.
        micro_batch_tokens: largest padded forward batch.
        max_length: longer transcripts are cut at the start and counted. None: the model's maximum.

    Raises:
        DataError: no scalar head, tokenizer, chat template or statistics.
    """

    def __init__(
        self,
        folder: Path,
        policy: Chat,
        *,
        dtype: torch.dtype,
        device: torch.device,
        micro_batch_tokens: int,
        normalise: bool,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._stats = read_stats(folder) if normalise else None
        self.chat = reward_chat(folder, policy, trust_remote_code=trust_remote_code)
        self.takes_tokens = self.chat.fingerprint == policy.fingerprint
        scorer = load_scorer(folder, dtype, trust_remote_code=trust_remote_code)
        self._num_embeddings = int(scorer.get_input_embeddings().num_embeddings)
        self._max_length = min((n for n in (max_length, window(scorer.config)) if n), default=None)
        self._num_heads = num_heads(scorer.config)
        self._model = ValueModel(scorer).eval().requires_grad_(False).to(device)
        self._device, self._micro_batch_tokens = device, micro_batch_tokens

    def scores(self, table: pa.Table) -> list[Score]:
        """A sample fails if its score is not finite or the model's chat template rejects its conversation.

        The parts are the score before normalisation (`model`), and with several heads their standard deviation
        (DISAGREEMENT).
        """
        transcripts = self._transcripts(table)
        raw = iter(self.head_scores([found for found in transcripts if isinstance(found, Transcript)]))
        return [
            self._score(next(raw), found) if isinstance(found, Transcript) else Score(None, error=str(found))
            for found in transcripts
        ]

    def head_scores(self, transcripts: Sequence[Transcript]) -> Numbers:
        """Scores before normalisation by each head: one row per transcript, in order."""
        scores_BH = np.zeros((len(transcripts), self._num_heads))
        for rows, micro in self._micro_batches(transcripts):
            with torch.no_grad():
                _, last_B = self._model(micro)
            scores_BH[rows] = last_B.float().cpu().numpy().reshape(len(rows), -1)
        return scores_BH

    def head_states(self, transcripts: Sequence[Transcript]) -> tuple[Numbers, Numbers]:
        """(scores_BH, states_BD): the scores before normalisation by each head, and the states that the heads read."""
        scores_BH = np.zeros((len(transcripts), self._num_heads))
        states_BD = np.zeros((len(transcripts), self._model.head.weight.shape[-1]))
        for rows, micro in self._micro_batches(transcripts):
            with torch.no_grad():
                last_BD = self._model.last_states(micro)
                scores_BH[rows] = self._model.head(last_BD).float().cpu().numpy().reshape(len(rows), -1)
            states_BD[rows] = last_BD.float().cpu().numpy()
        return scores_BH, states_BD

    def states(self, table: pa.Table) -> pa.Table:
        """Table of schema.STATES for a table of schema.ROLLOUT. A sample fails as in `scores`."""
        transcripts = self._transcripts(table)
        found = iter(zip(*self.head_states([one for one in transcripts if isinstance(one, Transcript)]), strict=True))
        states = [_state(*next(found)) if isinstance(one, Transcript) else _no_state(str(one)) for one in transcripts]
        names = zip(table["row"].to_pylist(), table["prompt_id"].to_pylist(), states, strict=True)
        return pa.Table.from_pylist(
            [{"row": row, "prompt_id": prompt_id, **state} for row, prompt_id, state in names], schema.STATES
        )

    def _micro_batches(self, transcripts: Sequence[Transcript]) -> Iterator[tuple[list[int], MicroBatch]]:
        """With the rows of each among the transcripts."""
        if self._max_length is not None:
            transcripts = [transcript.last(self._max_length) for transcript in transcripts]
        rows = token_rows(
            [t.prompt_tokens.tolist() for t in transcripts], [t.response_tokens.tolist() for t in transcripts]
        )
        for batch in micro_batches(range(len(transcripts)), rows.lengths, self._micro_batch_tokens):
            yield list(batch), rows.pack(batch, self._device)

    def _transcripts(self, table: pa.Table) -> list[Transcript | DataError]:
        if not self.takes_tokens:
            return [self._from_text(sample) for sample in samples(table)]
        columns = (table[name].to_pylist() for name in ("prompt_tokens", "response_tokens"))
        found: list[Transcript | DataError] = []
        for sample, prompt, response in zip(samples(table), *columns, strict=True):
            whole = Transcript(np.array(prompt, np.int32), self.chat.closed(np.array(response, np.int32)))
            # A policy with padded embeddings can sample ids beyond this model's vocabulary.
            found.append(whole if whole.tokens.max() < self._num_embeddings else self._from_text(sample))
        return found

    def _from_text(self, sample: Sample) -> Transcript | DataError:
        turns = sample.meta.get("messages") or [{"role": "user", "content": sample.prompt}]
        try:
            return self.chat.reply(messages_from_dicts(turns), sample.response, sample.meta.get("tools", ()))
        except DataError as error:
            return error

    def _score(self, heads_H: Numbers, transcript: Transcript) -> Score:
        raw = float(mean_scores(heads_H))
        cut = max(len(transcript) - self._max_length, 0) if self._max_length is not None else 0
        if not math.isfinite(raw):
            return Score(None, error=f"the reward model's score is {raw}", tokens_cut=cut)
        parts = {"model": raw} | ({DISAGREEMENT: float(disagreement(heads_H))} if len(heads_H) > 1 else {})
        return Score(self._stats.normalised(raw) if self._stats else raw, parts, tokens_cut=cut)


def _state(heads_H: Numbers, state_D: Numbers) -> Mapping[str, Any]:
    if not (np.isfinite(heads_H).all() and np.isfinite(state_D).all()):
        return _no_state("the reward model's scores are not finite")
    return {"heads": heads_H, "state": state_D, "error": None}


def _no_state(error: str) -> Mapping[str, Any]:
    return {"heads": None, "state": None, "error": error}


def build(reward: ModelSource, context: RewardContext) -> RewardModel:
    """Builds the reward model of a replica. Raises ConfigError if the section names none."""
    if reward.path is None:
        raise ConfigError(f"{context.key}.name='model' needs {context.key}.path: give the folder of a reward model.")
    torch.set_num_threads(context.threads)
    policy, trust = context.policy, context.policy.trust_remote_code
    return RewardModel(
        resolve_model(reward.path, context.cache),
        load_chat(resolve_model(policy.path, context.cache), policy, context.template),
        dtype=torch_dtype(policy.compute_dtype),
        device=compute_device(),
        micro_batch_tokens=reward.micro_batch_tokens,
        normalise=reward.normalise,
        max_length=reward.max_length,
        trust_remote_code=trust,
    )
