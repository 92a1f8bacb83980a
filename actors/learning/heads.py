"""What stands on a transformer's hidden states: log-probabilities of given tokens, and scalar values.

Shapes: N selected positions, D hidden size, V vocabulary, B rows, T positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actors.learning.packing import MicroBatch


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(h Wᵀ / temperature)[target] and the softmax's entropy, a chunk of positions at a time.

    Logits of one chunk live at a time: forward keeps only the entropy, backward makes the logits again. Softmax is in
    fp32, matrix products in the weights' type, dW accumulates in fp32. What is as large as the logits is computed in
    place where it can be: on the CPU, fresh pages cost more than the arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies = [], []
        for part in _chunks(len(targets_N), chunk):
            log_p = _logits(hidden_ND[part], weight_VD, temperature).log_softmax(-1)
            logprobs.append(log_p.gather(-1, targets_N[part].unsqueeze(-1)).squeeze(-1))
            entropies.append(log_p.exp().mul_(log_p).sum(-1).neg_())
        logprobs_N, entropy_N = torch.cat(logprobs), torch.cat(entropies)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, entropy_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None) -> Any:
        hidden_ND, weight_VD, targets_N, entropy_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros_like(entropy_N)
        for part in _chunks(len(targets_N), ctx.chunk):
            logits = _logits(hidden_ND[part], weight_VD, ctx.temperature)
            grad_chosen = grad_logprobs_N[part].unsqueeze(-1)
            if grad_entropy_N is None:
                grad_logits = logits.softmax(-1).mul_(-grad_chosen)
            else:  # dH/dlogit_j = -p_j (log p_j + H)
                log_p = logits.log_softmax(-1)
                p, grad_entropy = log_p.exp(), grad_entropy_N[part].unsqueeze(-1)
                grad_logits = log_p.add_(entropy_N[part].unsqueeze(-1)).mul_(grad_entropy).add_(grad_chosen)
                grad_logits.mul_(p).neg_()
            grad_logits.scatter_add_(-1, targets_N[part].unsqueeze(-1), grad_chosen)
            grad_logits = _divided(grad_logits, ctx.temperature).to(weight_VD.dtype)
            grad_hidden_ND[part] = grad_logits @ weight_VD
            grad_weight_VD += grad_logits.T @ hidden_ND[part]
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None, None


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]


def _logits(hidden_ND: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    return _divided((hidden_ND @ weight_VD.T).float(), temperature)


def _divided(tensor: Tensor, temperature: float) -> Tensor:
    """In place."""
    return tensor if temperature == 1.0 else tensor.div_(temperature)


class TokenLogProbs(nn.Module):
    """The LM head on chosen positions. Holds the head's own parameter, so that ZeRO-3 gathers it for this module."""

    def __init__(self, weight: nn.Parameter, *, temperature: float, chunk: int) -> None:
        super().__init__()
        self.weight, self.temperature, self.chunk = weight, temperature, chunk

    def forward(self, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        apply: Any = _TokenLogProbs.apply
        logprobs_N, entropy_N = apply(hidden_ND, self.weight, targets_N, self.temperature, self.chunk)
        return logprobs_N, entropy_N


class ScalarHead(nn.Module):
    """One number per position, in fp32 whatever the weights' type."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden_ND: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(hidden_ND.float(), self.weight.float(), bias).squeeze(-1)


class PolicyModel(nn.Module):
    """Log-probs and entropies of response tokens, at a temperature.

    Args:
        language_model: a causal LM of transformers.
        chunk: positions whose logits live at the same time.
    """

    def __init__(self, language_model: Any, *, temperature: float, chunk: int = 512) -> None:
        super().__init__()
        self.pretrained = language_model
        self.head = TokenLogProbs(language_model.get_output_embeddings().weight, temperature=temperature, chunk=chunk)

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """(logprobs_N, entropy_N) in fp32."""
        decoder = self.pretrained.get_decoder()
        hidden_LTD = decoder(input_ids=micro.input_ids_BT, use_cache=False, **micro.shared).last_hidden_state
        logprobs_N, entropy_N = self.head(hidden_LTD.flatten(0, 1)[micro.state_index_N], micro.targets_N)
        return logprobs_N, entropy_N


class ValueModel(nn.Module):
    """Values of the states in which response tokens are chosen, and of the state after the last one.

    Args:
        scorer: a one-label sequence classifier of transformers.
    """

    def __init__(self, scorer: Any) -> None:
        super().__init__()
        self.pretrained = scorer
        head = scorer.score
        self.head = ScalarHead(head.weight, getattr(head, "bias", None))

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """(values_N, last_values_B) in fp32; a reward model's score of a sequence is its last value."""
        backbone = getattr(self.pretrained, self.pretrained.base_model_prefix)
        hidden_BTD = backbone(input_ids=micro.input_ids_BT, use_cache=False, **micro.shared).last_hidden_state
        wanted = torch.cat([micro.state_index_N, micro.last_index_B])
        values = self.head(hidden_BTD.flatten(0, 1)[wanted])
        values_N, last_B = values.split([len(micro.state_index_N), len(micro.last_index_B)])
        return values_N, last_B
