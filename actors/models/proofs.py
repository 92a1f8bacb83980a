"""What this program relies on about a model, proved on a few tokens when the model is loaded.

- Its logits are a function of the decoder's last hidden states, and that function is the head that we compute with.
- Earlier positions do not see later ones.
- A sequence classifier's score is its linear head on the last position's hidden state.
- A model that learns is deterministic, and computes the same as when it scores.
- Loading fills all of it. transformers makes a model without memory, fills in what files hold, and initialises the
  rest: a buffer that no file holds and no code initialises would keep what was in memory before.

A model that fails a proof is refused: its numbers would be wrong without an error.

Shapes: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import deterministic

from orchestrator.errors import DataError

PROBE = (5, 6, 7, 8)
_LARGE = 1000.0  # logits this large show every cap
_TRIES = 8
_SHOWN = 3
_STEPS, _SLOPE_ERROR = (1e-2, 2e-3, 5e-4), 0.05
# Errors of a model whose forward does not support such a call.
FORWARD_ERRORS = (
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    NotImplementedError,
    AssertionError,
)


@contextmanager
def recognisable_memory() -> Iterator[None]:
    """New memory holds NaN, or of integers the largest number, until it is written."""
    memory: Any = deterministic
    was_on, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned)
        memory.fill_uninitialized_memory = filled


def require_initialised(model: Any, folder: Path) -> None:
    """Raises DataError if a buffer of a model that was loaded in `recognisable_memory` was never written."""
    left = [name for name, buffer in model.named_non_persistent_buffers() if _is_unwritten(buffer)]
    if left:
        names = ", ".join(left[:_SHOWN]) + (", ..." if len(left) > _SHOWN else "")
        raise DataError(
            f"{folder} can't be loaded as {type(model).__name__}: transformers leaves {names} without a value, so it "
            "would compute with whatever is in memory. Give a model of another architecture; without a reward model or "
            "a critic (an algorithm such as grpo) this one may still serve as the policy."
        )


def prove_loading(model: Any, folder: Path) -> None:
    """Loads a small model from its own state. Raises DataError if that leaves a buffer without a value."""
    with recognisable_memory():
        config = copy.deepcopy(model.config)
        again = type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=torch.float32)
    require_initialised(again, folder)


def _is_unwritten(buffer: Tensor) -> bool:
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    if buffer.dtype == torch.bool or not buffer.numel():
        return False
    return bool((buffer == torch.iinfo(buffer.dtype).max).all())


def has_linear_logits(language_model: Any, own_logits: Callable[[Tensor], Tensor]) -> bool:
    """Whether logits are hidden states times the matrix of the LM head, and nothing else.

    Args:
        own_logits: the model's logits from given hidden states; proved here to equal those of its forward.

    Raises:
        DataError: logits are not a function of the decoder's hidden states, or a position sees later ones.
    """
    with torch.no_grad():
        try:
            logits_NV, hidden_ND = _forward(language_model, PROBE)
            _, other_ND = _forward(language_model, (*PROBE[:-1], 4))
            again_NV = own_logits(hidden_ND)
        except FORWARD_ERRORS as error:
            raise _refused(
                language_model, f"its forward can't be followed ({type(error).__name__}: {error})"
            ) from error
        if not torch.isfinite(logits_NV).all():
            raise _refused(language_model, "its logits are NaN or infinite", "Are its weights damaged?")
        if not _close(again_NV, logits_NV):
            raise _refused(language_model, "its logits are not a function of its decoder's last hidden states")
        if not _close(other_ND[:-1], hidden_ND[:-1], factor=10.0):
            raise _refused(language_model, "a token's log-prob depends on the tokens behind it: it is no causal model")
        return _is_linear(language_model.get_output_embeddings(), own_logits, hidden_ND)


def _forward(language_model: Any, tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(logits, hidden states of the decoder alone)"""
    input_ids = _ids(language_model, tokens)
    logits = language_model(input_ids=input_ids, use_cache=False).logits
    hidden = language_model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    return logits[0], hidden[0]


def _is_linear(head: Any, own_logits: Callable[[Tensor], Tensor], hidden_ND: Tensor) -> bool:
    """Compares at logits of 0 (which show a bias), at those of a few tokens, and at large ones (which show a cap)."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != hidden_ND.shape[1]:
        return False
    if getattr(head, "bias", None) is not None:
        return False
    plain_NV = hidden_ND @ weight.T
    for factor in (0.0, 1.0, _LARGE / max(plain_NV.abs().max().item(), 1e-6)):
        scaled_ND = hidden_ND * factor
        plain_NV, own_NV = scaled_ND @ weight.T, own_logits(scaled_ND)
        if plain_NV.shape != own_NV.shape or not _close(own_NV, plain_NV):
            return False
    return True


def require_own_scores(scorer: Any) -> None:
    """Raises DataError when a sequence classifier's score is not its linear head on its backbone's output for the last
    token. The head may be all zero, so its input is compared too, not only its output."""
    input_ids = _ids(scorer, PROBE)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = scorer.score.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    try:
        with torch.no_grad():
            logits = scorer(input_ids=input_ids, use_cache=False).logits
            backbone = getattr(scorer, scorer.base_model_prefix)
            last_D = backbone(input_ids=input_ids, use_cache=False).last_hidden_state[0, -1]
    except FORWARD_ERRORS as error:
        raise _refused(scorer, f"its forward can't be followed ({type(error).__name__}: {error})") from error
    finally:
        hook.remove()
    read, given = (tensor.flatten(0, -2)[-1] for tensor in seen[0]) if seen else (last_D[:0], last_D[:0])
    if len(seen) != 1 or not _close(read, last_D) or not _close(logits[0], given):
        raise _refused(scorer, "its score is not its linear head on the last token's hidden state")


def require_steady(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    """Raises DataError when a model in training mode is not deterministic, or gives another result than in
    evaluation mode. Names a responsible module if one is found.

    Args:
        forward: calls the model on a few tokens.
    """
    was_training = model.training
    with torch.enable_grad():
        model.eval()
        expected = forward().detach()
        model.train()
        state = torch.get_rng_state()
        found = forward().detach()
        drew = not torch.equal(state, torch.get_rng_state())
        # If random numbers were drawn, these few tokens may be unaffected by chance, so it is tried several times.
        same = _close(found, expected) and all(
            _close(forward().detach(), expected) for _ in range(_TRIES if drew else 1)
        )
        culprit = None if same else _unsteady(model, forward)
    model.train(was_training)
    if not same:
        pretrained: Any = model.pretrained
        where = f" ({culprit})" if culprit else ""
        raise _refused(
            pretrained,
            f"in training it computes by chance or otherwise than in scoring{where}, as dropout does",
            "Set gradient_checkpointing=false, or set its dropouts to 0 in config.json.",
        )


def require_gradient(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    """Raises DataError when the gradient of a model in training mode is not the slope of its output, measured by
    small steps of all parameters in a random direction. For small fp32 models.

    Args:
        forward: calls the model on a few tokens.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        found = torch.autograd.grad(forward().double().sum(), parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(0)
    directions = [p.detach().abs().mean() * torch.randn(p.shape, generator=generator) for p in parameters]
    pairs = [(g.double(), d.double()) for g, d in zip(found, directions, strict=True) if g is not None]
    told = sum(float((gradient * direction).sum()) for gradient, direction in pairs)
    scale = math.sqrt(sum(float((gradient * direction).square().sum()) for gradient, direction in pairs))
    # A step may change which experts are chosen; then a smaller step is tried.
    slopes = [_slope(parameters, directions, forward, step / max(scale, 1e-12)) for step in _STEPS]
    if not any(abs(slope - told) <= _SLOPE_ERROR * scale for slope in slopes):
        pretrained: Any = model.pretrained
        raise _refused(pretrained, f"its gradient says a slope of {told:.3g} where steps measure {slopes[0]:.3g}")


def _slope(parameters: list[nn.Parameter], directions: list[Tensor], forward: Callable[[], Tensor], by: float) -> float:
    values = []
    with torch.no_grad():
        for factor in (by, -2 * by, by):  # the last one goes back
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=factor)
            values.append(float(forward().double().sum()))
    return (values[0] - values[1]) / (2 * by)


def _unsteady(model: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    """The first module whose output differs between two forwards although its inputs do not."""
    names = {module: name for name, module in model.named_modules()}
    seen: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def remember(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        seen.setdefault(module, []).append((_tensors((inputs, named)), _tensors(output)))

    hooks = [module.register_forward_hook(remember, with_kwargs=True) for module in names]
    try:
        for _ in range(2):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    for module, calls in seen.items():
        first, second = calls[0], calls[len(calls) // 2]
        if _equal(first[0], second[0]) and not _equal(first[1], second[1]):
            return f"{names[module]}, a {type(module).__name__}"
    return None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _ids(model: Any, tokens: tuple[int, ...]) -> Tensor:
    embeddings = model.get_input_embeddings().weight
    return torch.tensor([[token % len(embeddings) for token in tokens]], device=embeddings.device)


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2


def _close(found: Tensor, expected: Tensor, *, factor: float = 1.0) -> bool:
    """Equal up to rounding, relative to the largest number. Broken weights give NaN on both sides; the checks of losses
    report them, with the step."""
    if found.shape != expected.shape:
        return False
    dtype = expected.dtype
    expected, found = expected.float(), found.float()
    limit = factor * _tolerance(dtype) * expected.abs().nan_to_num(0.0, posinf=0.0).max()
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool((same | ((found - expected).abs() <= limit)).all())


def _refused(model: Any, why: str, way_out: str = "Use a model of another architecture.") -> DataError:
    return DataError(
        f"{model.name_or_path} ({type(model).__name__}): {why}. Its numbers would be wrong here. {way_out}"
    )
