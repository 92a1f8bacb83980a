"""The references of the learner's benchmark: typical PPO updates in plain PyTorch.

A Hugging Face model, AdamW, padded batches with an attention mask, logits of all positions over the whole vocabulary.
Tuned: rows sorted by length, fused AdamW, the fastest number of rows per forward. With masters: also fp32 master
weights, as in ours (without them, updates smaller than bf16's precision are lost).

Shapes: B rows, T tokens of the longest (right-padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from actors.models.model import load_causal, load_scorer
from benchmarks.work import Work

CLIP = 0.2
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Style:
    """Variant of the loop.

    Args:
        rows_per_forward: by name of the work.
    """

    rows_per_forward: Mapping[str, int]
    sorted_rows: bool = False
    fused: bool = False
    masters: bool = False


_BEST_ROWS = {"quickstart": 8, "gsm8k": 4}
STYLES = {
    "plain": Style({"quickstart": 8, "gsm8k": 8}),
    "tuned": Style(_BEST_ROWS, sorted_rows=True, fused=True),
    "masters": Style(_BEST_ROWS, sorted_rows=True, fused=True, masters=True),
}


class PlainLoop:
    """One model and its AdamW.

    Args:
        role: "policy" or "critic".
    """

    def __init__(self, role: str, style: Style, work: Work) -> None:
        self._role, self._style = role, style
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = work.dtype
        model = (
            load_causal(work.folder, dtype) if role == "policy" else load_scorer(work.folder, dtype, new_head="zero")
        )
        self._model: Any = model.to(self._device)
        self._parameters = list(self._model.parameters())
        self._masters = [p.detach().float() for p in self._parameters] if style.masters else self._parameters
        self._optimizer = torch.optim.AdamW(self._masters, lr=LEARNING_RATE, fused=style.fused or None)

    def learn(self, table: pa.Table, *, minibatches: int, rows_per_forward: int) -> None:
        """One epoch, with one optimizer step per minibatch."""
        columns = {name: table[name].to_pylist() for name in table.column_names}
        permutation = np.random.default_rng(0).permutation(table.num_rows)
        for minibatch in np.array_split(permutation, minibatches):
            rows = [int(row) for row in minibatch]
            if self._style.sorted_rows:
                rows.sort(key=lambda row: -len(columns["prompt_tokens"][row]) - len(columns["response_tokens"][row]))
            count = sum(len(columns["response_tokens"][row]) for row in rows)
            for start in range(0, len(rows), rows_per_forward):
                batch = padded(columns, rows[start : start + rows_per_forward], self._device)
                loss = self._policy_loss(batch) if self._role == "policy" else self._value_loss(batch)
                torch.autograd.backward(loss / count)
            self._step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _policy_loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits_BTV = self._model(input_ids=batch["ids"], attention_mask=batch["attention"], use_cache=False).logits
        logprobs_BTV = torch.log_softmax(logits_BTV[:, :-1].float(), dim=-1)
        logprobs_BT = logprobs_BTV.gather(-1, batch["ids"][:, 1:, None]).squeeze(-1)
        ratio_BT = (logprobs_BT - batch["old_logprobs"]).exp()
        advantages_BT = batch["advantages"]
        loss_BT = -torch.minimum(ratio_BT * advantages_BT, ratio_BT.clamp(1 - CLIP, 1 + CLIP) * advantages_BT)
        return (loss_BT * batch["response"]).sum()

    def _value_loss(self, batch: dict[str, Tensor]) -> Tensor:
        backbone = getattr(self._model, self._model.base_model_prefix)
        hidden = backbone(input_ids=batch["ids"], attention_mask=batch["attention"], use_cache=False)
        values_BT = self._model.score(hidden.last_hidden_state).squeeze(-1)[:, :-1].float()
        old_BT, returns_BT = batch["values"], batch["returns"]
        clipped_BT = old_BT + (values_BT - old_BT).clamp(-CLIP, CLIP)
        loss_BT = 0.5 * torch.maximum((values_BT - returns_BT) ** 2, (clipped_BT - returns_BT) ** 2)
        return (loss_BT * batch["response"]).sum()

    def _step(self) -> None:
        if self._style.masters:
            for master, parameter in zip(self._masters, self._parameters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._optimizer.step()
        if self._style.masters:
            with torch.no_grad():
                for master, parameter in zip(self._masters, self._parameters, strict=True):
                    parameter.copy_(master)
        for parameter in (*self._masters, *self._parameters):
            parameter.grad = None


def padded(columns: dict[str, list[Any]], rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Tokens and their attention mask (B, T); per-token columns and `response` (B, T - 1) at the position before."""
    lengths = [(len(columns["prompt_tokens"][row]), len(columns["response_tokens"][row])) for row in rows]
    width = max(prompt + response for prompt, response in lengths)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    attention_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    per_token = {
        name: torch.zeros(len(rows), width - 1)
        for name in ("old_logprobs", "advantages", "values", "returns", "response")
    }
    for place, (row, (prompt, response)) in enumerate(zip(rows, lengths, strict=True)):
        ids_BT[place, :prompt] = torch.tensor(columns["prompt_tokens"][row])
        ids_BT[place, prompt : prompt + response] = torch.tensor(columns["response_tokens"][row])
        attention_BT[place, : prompt + response] = 1
        here = slice(prompt - 1, prompt + response - 1)
        for name, tensor in per_token.items():
            tensor[place, here] = 1.0 if name == "response" else torch.tensor(columns[name][row])
    batch = {"ids": ids_BT, "attention": attention_BT, **per_token}
    return {name: tensor.to(device) for name, tensor in batch.items()}
