"""Writes tensors straight to the places where a CPU engine keeps them, without vLLM's reload.

vLLM's reload caches, materializes, loads and copies each layer. If a model keeps nothing but what its loader moved
there (`locate` shows where) and packed copies of linear layers, writing the parameters and packing these layers again
has the same result. `obstacle` says why it may not; then vLLM reloads the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from actors.weights.places import Place, Places, View
from actors.weights.readback import Reader

_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
_Key = tuple[str, str]  # module, parameter


def obstacle(model: nn.Module, places: Places) -> str | None:
    """Why weights can't be written to their places alone. None: they can."""
    modules = dict(model.named_modules())
    for place in (place for many in places.values() for place in many):
        layer: Any = modules[place.module]
        method = getattr(layer, "quant_method", None)
        if method is not None and type(method) not in _METHODS:
            return f"{place.module} is processed by {type(method).__name__}"
        parameter: torch.Tensor = getattr(layer, place.parameter)
        if hasattr(layer, "cpu_linear") and place.parameter == "weight" and parameter.dim() > 2:
            return f"{place.module} packs a weight of {parameter.dim()} dimensions"
        if not parameter.is_contiguous():
            return f"{place.module}.{place.parameter} is not contiguous"
    for name, layer in modules.items():
        if isinstance(layer, MLAAttention):
            return f"{name} keeps products of weights"
        derived = next(_other_tensors(layer), None)
        if derived is not None:
            return f"{name} keeps a tensor {derived} besides its parameters"
    return None


def _other_tensors(layer: nn.Module) -> Iterator[str]:
    """Names of floating-point tensors that a module or an object in it keeps outside its parameters and buffers."""
    registered = {id(tensor) for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))}
    for name, value in vars(layer).items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        inner = vars(value) if hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) else {}
        for path, item in ((name, value), *((f"{name}.{key}", item) for key, item in inner.items())):
            for tensor in item if isinstance(item, list | tuple) else (item,):
                is_weight = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() > 1
                if is_weight and id(tensor) not in registered:
                    yield path


class Writer:
    """Writes to one model. A layer is packed when all of its parts have arrived."""

    def __init__(self, model: nn.Module, places: Places, reader: Reader) -> None:
        self._places, self._reader = places, reader
        self._modules: Mapping[str, Any] = dict(model.named_modules())
        self._views = _views(places)
        self._sizes = {key: sum(view.num_elements for view in views) for key, views in self._views.items()}
        self._staged: dict[_Key, torch.Tensor] = {}
        self._left: dict[_Key, set[View]] = {}

    def begin(self) -> None:
        self._staged = {}
        self._left = {key: set(views) for key, views in self._views.items()}

    @torch.no_grad()
    def write(self, name: str, tensor: torch.Tensor) -> None:
        for place in self._places.get(name, ()):
            if not place.tied:
                self._write(place, tensor)

    @torch.no_grad()
    def finish(self) -> None:
        """Packs layers that lack parts, with their old ones, so that reading back names just the missing tensors."""
        for key, views in self._left.items():
            if not views or len(views) == len(self._views[key]):
                continue
            if key in self._staged:
                held = self._held(key)
                for view in views:
                    view.of(self._staged[key]).copy_(view.of(held))
            self._pack_if_needed(key)

    def _write(self, place: Place, tensor: torch.Tensor) -> None:
        key = place.module, place.parameter
        target = self._target(key)
        place.held.of(target).copy_(place.sent.of(tensor))
        self._left[key].discard(place.held)
        if not self._left[key]:
            self._pack_if_needed(key)

    def _target(self, key: _Key) -> torch.Tensor:
        """The parameter; in place of an emptied one, a new tensor that becomes the packed weight."""
        parameter = self._reader.parameter(*key)
        if parameter.numel() >= self._sizes[key]:
            return parameter
        if key not in self._staged:
            shape = self._reader.shape(key[0])
            is_filled = shape.numel() == self._sizes[key]
            self._staged[key] = torch.empty(shape, dtype=parameter.dtype) if is_filled else self._held(key)
        return self._staged[key]

    def _held(self, key: _Key) -> torch.Tensor:
        """The packed weight, with the padding that no tensor fills."""
        (way,) = self._reader.ways(*key)
        return self._reader.read(*key, way).clone()

    def _pack_if_needed(self, key: _Key) -> None:
        if not set(self._reader.ways(*key)) & {"packed", "product"}:
            return
        layer = self._modules[key[0]]
        if key in self._staged:
            layer.weight = nn.Parameter(self._staged.pop(key), requires_grad=False)
        layer.quant_method.process_weights_after_loading(layer)


def _views(places: Places) -> dict[_Key, set[View]]:
    views: dict[_Key, set[View]] = defaultdict(set)
    for place in (place for many in places.values() for place in many if not place.tied):
        views[place.module, place.parameter].add(place.held)
    return views
