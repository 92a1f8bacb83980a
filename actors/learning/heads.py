"""Heads on a transformer's hidden states: log-probabilities of given tokens, and scalar values.

Shapes: N selected positions, D hidden size, V vocabulary, B rows, T positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from actors.learning.packing import MicroBatch, token_rows
from actors.models import proofs
from actors.models.steady import SteadyModel


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(h Wᵀ / temperature)[target] and the softmax's entropy, a chunk of positions at a time.

    Only the logits of one chunk are in memory: forward keeps the entropy, backward computes the logits again. Softmax
    is in fp32, matrix products are in the weights' type, dW accumulates in fp32. Arrays as large as the logits are
    computed in place if possible: on CPUs page faults cost more than the arithmetic.
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
        learns = ctx.needs_input_grad[1]
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if learns else None
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
            if grad_weight_VD is not None:
                grad_weight_VD += grad_logits.T @ hidden_ND[part]
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, grad_weight, None, None, None


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]


def _logits(hidden_ND: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    return _divided((hidden_ND @ weight_VD.T).float(), temperature)


def _divided(tensor: Tensor, temperature: float) -> Tensor:
    """In place."""
    return tensor if temperature == 1.0 else tensor.div_(temperature)


class TokenLogProbs(nn.Module):
    """The LM head on selected positions. Holds the head's parameter, so that ZeRO-3 gathers it for this module."""

    def __init__(self, weight: nn.Parameter, *, temperature: float, chunk: int) -> None:
        super().__init__()
        self.weight, self.temperature, self.chunk = weight, temperature, chunk

    def forward(self, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        apply: Any = _TokenLogProbs.apply
        logprobs_N, entropy_N = apply(hidden_ND, self.weight, targets_N, self.temperature, self.chunk)
        return logprobs_N, entropy_N


class OwnLogProbs(nn.Module):
    """The same for models whose logits are more than hidden states times a matrix (scaled, capped, biased): uses the
    model's own forward, a chunk of positions at a time. Backward computes the logits of a chunk again.

    Owns no parameters: they belong to the language model. ZeRO-3 must gather those in `read` for this module: ranks
    have different numbers of chunks, so that modules called by chunk can't gather together.
    """

    def __init__(self, language_model: Any, *, temperature: float, chunk: int) -> None:
        super().__init__()
        self._logits = partial(own_logits, language_model)  # a partial: the model must not become a submodule
        self.temperature, self.chunk = temperature, chunk
        token = torch.zeros(1, 1, dtype=torch.long, device=language_model.device)
        with torch.no_grad():
            hidden_ND = language_model.get_decoder()(input_ids=token, use_cache=False).last_hidden_state[0]
        with torch.enable_grad():
            self.read = _parameters_behind(self._logits(hidden_ND))

    def forward(self, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            checkpoint(self._part, hidden_ND[part], targets_N[part], use_reentrant=False, preserve_rng_state=False)
            for part in _chunks(len(targets_N), self.chunk)
        ]
        return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])

    def _part(self, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (self._logits(hidden_ND).float() / self.temperature).log_softmax(-1)
        return log_p.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def _parameters_behind(output: Tensor) -> tuple[nn.Parameter, ...]:
    """The parameters from which a tensor was computed."""
    found: list[nn.Parameter] = []
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes += [follower for follower, _ in node.next_functions]
    return tuple(found)


def own_logits(language_model: Any, hidden_ND: Tensor) -> Tensor:
    """Logits of a causal LM from given hidden states: its forward with a replaced decoder output."""
    unread = 1 if language_model.config.pad_token_id == 0 else 0  # transformers warns about padding
    positions = torch.full((1, len(hidden_ND)), unread, device=hidden_ND.device)
    decoder = language_model.get_decoder()
    inside = set(decoder.modules()) - {decoder}
    outside = [module for module in language_model.modules() if module not in inside]
    with _answering(decoder, hidden_ND.unsqueeze(0)), _without_hooks(outside):
        logits: Tensor = language_model(input_ids=positions, use_cache=False).logits
    return logits[0]


@contextmanager
def _without_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules compute without their forward hooks, by which ZeRO-3 gathers parameters with the other ranks."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    kept = [(module, name, vars(module)[name]) for module in modules for name in names]
    for module, name, _ in kept:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)


class _Answer(BaseModelOutputWithPast):
    """A decoder's output with hidden states only; all other fields (router logits, ...) are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _answering(decoder: nn.Module, hidden_1ND: Tensor) -> Iterator[None]:
    own = vars(decoder).get("forward")
    decoder.forward = lambda *_, **__: _Answer(last_hidden_state=hidden_1ND)
    try:
        yield
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


class ScalarHead(nn.Module):
    """One number per position, or one per head, in fp32 whatever the weights' type."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden_ND: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(hidden_ND.float(), self.weight.float(), bias).squeeze(-1)


def states_at(hidden_LTD: Tensor, index_N: Tensor) -> Tensor:
    """The states of some tokens of all lines, with a deterministic gradient.

    The last token of a shared prompt is taken once per sample. In fp32 on CPUs torch 2 adds the gradients
    of `x[index]` with atomics, in arbitrary order, but those of `index_select` in the order of the index.
    """
    hidden_MD = hidden_LTD.flatten(0, 1)
    if hidden_MD.dtype == torch.float32 and hidden_MD.device.type == "cpu":
        return hidden_MD.index_select(0, index_N)
    return hidden_MD[index_N]


class PolicyModel(SteadyModel):
    """Log-probs and entropies of response tokens, at a temperature.

    Args:
        language_model: a causal LM of transformers.
        chunk: positions whose logits are in memory at the same time.

    Raises:
        DataError: the log-probs would differ from the model's, see proofs.py.
    """

    def __init__(self, language_model: Any, *, temperature: float, chunk: int = 512) -> None:
        super().__init__()
        self.pretrained = language_model
        head = language_model.get_output_embeddings()
        self.head: TokenLogProbs | OwnLogProbs
        if proofs.has_linear_logits(language_model, partial(own_logits, language_model)):
            self.head = TokenLogProbs(head.weight, temperature=temperature, chunk=chunk)
        else:
            self.head = OwnLogProbs(language_model, temperature=temperature, chunk=chunk)

    def around(self, language_model: Any) -> PolicyModel:
        """The same for another model."""
        temperature, chunk = self.head.temperature, self.head.chunk
        return PolicyModel(language_model, temperature=temperature, chunk=chunk)

    def decoder(self) -> Any:
        return self.pretrained.get_decoder()

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """(logprobs_N, entropy_N) in fp32."""
        hidden_LTD = self.decoder()(input_ids=micro.input_ids_BT, use_cache=False, **micro.shared).last_hidden_state
        logprobs_N, entropy_N = self.head(states_at(hidden_LTD, micro.state_index_N), micro.targets_N)
        return logprobs_N, entropy_N


class ValueModel(SteadyModel):
    """Values of the states in which response tokens are chosen, and of the state after the last one.

    Args:
        scorer: a sequence classifier of transformers with one label, or with one per head (reward_heads.py).

    Raises:
        DataError: the values would differ from the model's scores, see proofs.py.
    """

    def __init__(self, scorer: Any) -> None:
        super().__init__()
        self.pretrained = scorer
        head = scorer.score
        self.head = ScalarHead(head.weight, getattr(head, "bias", None))
        proofs.require_own_scores(scorer)

    def around(self, scorer: Any) -> ValueModel:
        """The same for another model."""
        return ValueModel(scorer)

    def decoder(self) -> Any:
        return getattr(self.pretrained, self.pretrained.base_model_prefix)

    def learned_head(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """(values_N, last_values_B) in fp32; a reward model's score of a sequence is its last value. With several heads
        (values_NH, last_values_BH)."""
        hidden_BTD = self.decoder()(input_ids=micro.input_ids_BT, use_cache=False, **micro.shared).last_hidden_state
        wanted = torch.cat([micro.state_index_N, micro.last_index_B])
        values = self.head(states_at(hidden_BTD, wanted))
        values_N, last_B = values.split([len(micro.state_index_N), len(micro.last_index_B)])
        return values_N, last_B

    def last_states(self, micro: MicroBatch) -> Tensor:
        """The states (B, D) of the last tokens, from which the head computes the last values."""
        hidden_BTD = self.decoder()(input_ids=micro.input_ids_BT, use_cache=False, **micro.shared).last_hidden_state
        return states_at(hidden_BTD, micro.last_index_B)


def probe(model: PolicyModel | ValueModel, device: torch.device) -> MicroBatch:
    """A micro-batch of a few tokens, to compare a model's outputs."""
    num_tokens = model.pretrained.get_input_embeddings().num_embeddings
    tokens = [token % num_tokens for token in proofs.PROBE]
    return token_rows([tokens[:2]], [tokens[2:]]).pack([0], device)


def probed(model: PolicyModel | ValueModel) -> Tensor:
    """A model's output on `probe`."""
    output: tuple[Tensor, Tensor] = model(probe(model, next(model.parameters()).device))
    return output[0]
