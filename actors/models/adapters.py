"""Low-rank adapters of a model's linear layers (LoRA, Hu 2021; DoRA, Liu 2024), added in place.

An adapted layer stays what it was, under the same names, with one more child: `adapters`, one of each name. Several
models may share a trunk, each with adapters of a name of its own; `select` says whose turn it is. Which layers are
adapted is proved on a few tokens: a module is a linear layer if it multiplies its inputs with its weight, whatever
its class.

Shapes: R rank, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from actors.models.quantised import FrozenWeight, product
from orchestrator.config.sections import LoraConfig
from orchestrator.errors import ConfigError, DataError
from orchestrator.prompts import derive_seed

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_SHORTEST = 1e-30
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Adapter(nn.Module):
    """What is added to one linear layer: scale · B A x; with DoRA, the rows of the sum also get lengths that learn.

    B is zero and the lengths are those of the weight, so that a new adapter changes nothing.

    Args:
        weight: of the layer; (O, I), or (I, O) if `transposed`.
        seed: of A.
    """

    def __init__(self, weight: Tensor, config: LoraConfig, *, transposed: bool, seed: int) -> None:
        super().__init__()
        self.scale, self.transposed = config.scale, transposed
        self.is_on = True
        num_outputs, num_inputs = weight.T.shape if transposed else weight.shape
        # As in the authors' code: U(-1/√I, 1/√I).
        drawn = torch.rand(config.rank, num_inputs, generator=torch.Generator().manual_seed(seed))
        self.A = nn.Parameter(((drawn * 2.0 - 1.0) / math.sqrt(num_inputs)).to(weight))
        self.B = nn.Parameter(weight.new_zeros(num_outputs, config.rank))
        self.magnitude = nn.Parameter(self._lengths(self._sum(weight)).to(weight)) if config.dora else None

    def forward(self, inputs: Tensor, output: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted layer's output, from the layer's own."""
        added = linear(linear(inputs, self.A) * self.scale, self.B)
        if self.magnitude is None:
            return output + added
        with torch.no_grad():  # the lengths count as constants (Liu 2024, section 4.3)
            lengths_O = self._lengths(self._sum(weight)).to(weight.dtype)
        ratio_O = self.magnitude / lengths_O
        product = output if bias is None else output - bias
        return output + (ratio_O - 1.0) * product + ratio_O * added

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The weight of one plain layer that computes the same, in fp32."""
        total_OI = self._sum(weight)
        if self.magnitude is not None:
            lengths_O = self._lengths(total_OI).to(weight.dtype)
            total_OI *= (self.magnitude.float() / lengths_O.float()).unsqueeze(1)
        return total_OI.T.contiguous() if self.transposed else total_OI

    def _sum(self, weight: Tensor) -> Tensor:
        weight_OI = weight.detach().T if self.transposed else weight.detach()
        return torch.addmm(weight_OI.float(), self.B.detach().float(), self.A.detach().float(), alpha=self.scale)

    def _lengths(self, total_OI: Tensor) -> Tensor:
        return total_OI.norm(dim=1).clamp(min=_SHORTEST)  # a pruned row has none, and lengths are divided by


class Adapted(nn.Module):
    """Mixed into the class of a linear layer. A quantised one may have no adapters."""

    adapters: nn.ModuleDict
    weight: Tensor
    bias: Tensor | None

    def forward(self, inputs: Tensor) -> Tensor:
        output = self._product(inputs)
        for adapter in self.adapters.values():  # at most one is on
            if adapter.is_on:
                output = adapter(inputs, output, self.weight, self.bias)
        return output

    def _product(self, inputs: Tensor) -> Tensor:
        output: Tensor = super().forward(inputs)
        return output


class Quantised(Adapted):
    """The same for a layer whose weight is kept in few bits; reading `weight` dequantises it."""

    frozen: FrozenWeight
    is_transposed: bool

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.frozen.tensor()

    def _product(self, inputs: Tensor) -> Tensor:
        return product(inputs, self.frozen, self.bias, transposed=self.is_transposed)


@cache
def _mixed(mixin: type, kind: Any) -> type:
    return type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})


def _quantise(layers: Sequence[LinearLayer], bits: int) -> None:
    """Keeps the weights of layers that have no adapters yet in 4 or 8 bits."""
    for layer in layers:
        module = layer.module
        if isinstance(module, Adapted):
            continue
        frozen = FrozenWeight(module.weight.detach(), bits)
        del module.weight
        module.__class__ = _mixed(Quantised, module.__class__)
        module.adapters, module.frozen, module.is_transposed = nn.ModuleDict(), frozen, layer.transposed


@dataclass(frozen=True)
class LinearLayer:
    """A layer that was proved linear. Its weight is (I, O) if `transposed`."""

    name: str
    module: Any
    transposed: bool


def adapt(model: Any, config: LoraConfig, *, name: str, seed: int, forward: Callable[[], Tensor]) -> None:
    """Freezes a PolicyModel or ValueModel, adds adapters, and selects them. A scalar head goes on learning. With
    config.trunk_bits, the weights of all linear layers are quantised first, once for all adapters of the trunk.

    Args:
        name: of the adapters; the trunk may have others.
        seed: of the run. An adapter's start depends on it and on the layer's name alone.
        forward: the model's output on a few tokens.

    Raises:
        ConfigError: a target is no linear layer, or weights can't be quantised.
        DataError: the model has no linear layers, or uses them in a way that adapters would not see.
    """
    pretrained = model.pretrained
    select(model, None)
    found, unused = linear_layers(model, forward)
    layers = _chosen(found, unused, config, pretrained)
    pretrained.requires_grad_(False)
    if config.trunk_bits is not None:
        _quantise(found, config.trunk_bits)
    for parameter in model.learned_head():
        parameter.requires_grad_(True)
    for layer in layers:
        module = layer.module
        start = derive_seed("lora", seed, layer.name)
        adapter = Adapter(module.weight, config, transposed=layer.transposed, seed=start)
        if not isinstance(module, Adapted):
            module.__class__ = _mixed(Adapted, module.__class__)
            module.adapters = nn.ModuleDict()
        module.adapters[name] = adapter
    select(model, name)
    _require_gradients(model, name, forward)


def linear_layers(model: Any, forward: Callable[[], Tensor]) -> tuple[list[LinearLayer], list[str]]:
    """(linear layers of a PolicyModel's or ValueModel's decoder, names of possible ones that `forward` did not use)"""
    pretrained = model.pretrained
    names = {module: name for name, module in pretrained.named_modules()}
    candidates = [module for module in model.decoder().modules() if module in names and _may_be_linear(module)]
    # By module: for each of its calls, whether it was a product with the transposed weight, and with the weight itself.
    calls: dict[Any, list[tuple[bool, bool]]] = {module: [] for module in candidates}
    hooks = [
        module.register_forward_hook(lambda *call: calls[call[0]].append(_products(*call))) for module in candidates
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    counts: dict[int, int] = {}
    for _, parameter in pretrained.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    found, unused = [], []
    for module in candidates:
        own = module._parameters.get("weight")  # None: quantised
        if own is not None and counts[id(own)] > 1:  # tied to another layer, which an adapter would not change
            continue
        if not calls[module]:
            unused.append(names[module])
        for transposed in (False, True):
            if calls[module] and all(call[transposed] for call in calls[module]):
                found.append(LinearLayer(names[module], module, transposed))
                break
    return found, unused


def _may_be_linear(module: Any) -> bool:
    """Whether its only parameters are a matrix `weight` and perhaps a `bias`."""
    if isinstance(module, Quantised):
        return True
    parameters = module._parameters
    weight = parameters.get("weight")
    others = set(parameters) - {"weight", "bias"}
    children = [child for name, child in module.named_children() if not (name == "adapters" and _is_adapted(module))]
    return weight is not None and weight.ndim == 2 and not others and not children


def _is_adapted(module: Any) -> bool:
    return isinstance(module, Adapted)


def _products(module: Any, inputs: tuple[Any, ...], output: Any) -> tuple[bool, bool]:
    """Whether an output is its input times the transposed weight, and times the weight itself."""
    bias, weight = getattr(module, "bias", None), module.weight
    return _is_product(inputs, output, weight, bias), _is_product(inputs, output, weight.T, bias)


def _is_product(inputs: tuple[Any, ...], output: Any, weight_OI: Tensor, bias: Tensor | None) -> bool:
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
        return False
    (given,) = inputs
    if not given.is_floating_point() or given.shape[-1] != weight_OI.shape[1]:
        return False
    expected = linear(given, weight_OI, bias)
    tolerance = _TOLERANCES.get(output.dtype, 2e-2) * max(expected.abs().max().item(), 1e-6)
    return output.shape == expected.shape and bool(((output - expected).abs() <= tolerance).all())


def _kind(name: str) -> str:
    return _NUMBER.sub("*", name)


def _chosen(
    layers: Sequence[LinearLayer], unused: Sequence[str], config: LoraConfig, pretrained: Any
) -> Sequence[LinearLayer]:
    """The layers that a config names.

    Raises:
        ConfigError: a target names none of them.
        DataError: there are no layers, or some of a kind were used and others were not, such as experts.
    """
    if not layers:
        raise DataError(
            f"{pretrained.name_or_path} ({type(pretrained).__name__}): no layer of its decoder is a linear layer by "
            "its outputs, so there is nothing to adapt. Set lora.rank=0."
        )
    last_parts = {layer.name.rpartition(".")[2] for layer in layers}
    unknown = [target for target in config.targets if target not in last_parts]
    if unknown:
        raise ConfigError(
            f"lora.targets: {', '.join(unknown)} names no linear layer of {pretrained.name_or_path}. It has "
            f"{', '.join(sorted(last_parts))}."
        )
    found = [layer for layer in layers if not config.targets or layer.name.rpartition(".")[2] in config.targets]
    kinds = {_kind(layer.name) for layer in found}
    left_out = [name for name in unused if _kind(name) in kinds]
    if left_out:
        others = sorted(last_parts - {name.rpartition(".")[2] for name in left_out})
        raise DataError(
            f"{pretrained.name_or_path}: {len(left_out)} layers such as {left_out[0]} were not used on a few tokens, "
            f"as experts may be, so adapters on them can't be proved. Set lora.targets to others: {', '.join(others)}."
        )
    return found


def _require_gradients(model: Any, name: str, forward: Callable[[], Tensor]) -> None:
    """Raises DataError if the output of a learning model does not depend on an adapter: its layer was bypassed."""
    was_training = model.training
    model.train()
    with torch.enable_grad():
        adapters = adapters_of(model.pretrained, name)
        gradients = torch.autograd.grad(
            forward().float().sum(), [adapter.B for adapter in adapters.values()], allow_unused=True
        )
    model.train(was_training)
    bypassed = [weight for weight, gradient in zip(adapters, gradients, strict=True) if gradient is None]
    if bypassed:
        pretrained = model.pretrained
        raise DataError(
            f"{pretrained.name_or_path} ({type(pretrained).__name__}): in training, {len(bypassed)} weights such as "
            f"{bypassed[0]} are read without calling their layers, so adapters there would not learn. Name other "
            "layers in lora.targets."
        )


def frozen_weights(pretrained: Any) -> Iterator[tuple[str, FrozenWeight]]:
    """(name of the weight, its quantised form)"""
    return (
        (f"{name}.weight", layer.frozen) for name, layer in adapted_layers(pretrained) if isinstance(layer, Quantised)
    )


def adapted_layers(pretrained: Any) -> Iterator[tuple[str, Any]]:
    """(name, layer) of the layers with adapters."""
    return ((name, module) for name, module in pretrained.named_modules() if isinstance(module, Adapted))


def adapters_of(pretrained: Any, name: str) -> Mapping[str, Adapter]:
    """The adapters of one name, by the weight that they change."""
    return {
        f"{layer}.weight": module.adapters[name]
        for layer, module in adapted_layers(pretrained)
        if name in module.adapters
    }


def select(model: nn.Module, name: str | None) -> None:
    """Only the adapters of this name compute and learn from now on; None: no adapter does."""
    for module in model.modules():
        if isinstance(module, Adapted):
            adapter: Any
            for key, adapter in module.adapters.items():
                adapter.is_on = key == name
                adapter.requires_grad_(key == name)


@contextmanager
def switched_off(adapters: Iterable[Adapter]) -> Iterator[None]:
    """The model computes as if it did not have these, which were on."""
    found = list(adapters)
    for adapter in found:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.is_on = True
