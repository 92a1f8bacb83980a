"""Writes tensors straight to the places where an engine keeps them, without vLLM's reload.

vLLM's reload caches, materializes, loads and copies each layer. If a model keeps nothing but what its loader moved
there (`locate` shows where) and packed copies of linear layers, writing the parameters and these copies has the same
result. Copies in panels are written where they are (actors.weights.packed); layers with others are packed again.
`obstacle` says why all this may not be enough; then vLLM reloads the model.
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

from actors.weights.manifest import TensorSpec
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
    """Writes to one model. A layer that must be packed is packed when all of its parts have arrived."""

    def __init__(self, model: nn.Module, places: Places, reader: Reader) -> None:
        self._places, self._reader = places, reader
        self._modules: Mapping[str, Any] = dict(model.named_modules())
        self._views = _views(places)
        self._sizes = {key: sum(view.num_elements for view in views) for key, views in self._views.items()}
        self._staged: dict[_Key, torch.Tensor] = {}
        self._left: dict[_Key, set[View]] = {}
        self._in_panels: set[_Key] = set()

    def begin(self) -> None:
        self._staged = {}
        self._in_panels = {key for key in self._views if self._is_made_of_panels(key)}
        self._left = {key: set(views) for key, views in self._views.items()}

    def room(self, spec: TensorSpec) -> torch.Tensor | None:
        """The bytes of a parameter that is the tensor, so that its pieces can arrive there. None: there is none."""
        places = [place for place in self._places.get(spec.name, ()) if not place.tied]
        if len(places) != 1:
            return None
        (place,) = places
        parameter = self._reader.parameter(place.module, place.parameter)
        held, sent = place.held.rows(spec.num_elements), place.sent.rows(spec.num_elements)
        is_whole = held == sent == range(1) and parameter.numel() == spec.num_elements
        return (
            parameter.detach().view(-1).view(torch.uint8) if is_whole and parameter.dtype == spec.torch_dtype else None
        )

    @torch.no_grad()
    def write(self, name: str, tensor: torch.Tensor) -> None:
        for place in self._places.get(name, ()):
            if not place.tied:
                self._write(place, tensor)

    @torch.no_grad()
    def finish(self) -> None:
        """Packs layers that lack parts, with their old ones, so that reading back names just the missing tensors."""
        for key, views in self._left.items():
            if not views or len(views) == len(self._views[key]) or key in self._in_panels:
                continue
            if key in self._staged:
                held = self._held(key)
                for view in views:
                    view.of(self._staged[key]).copy_(view.of(held))
            self._pack_if_needed(key)

    def _write(self, place: Place, tensor: torch.Tensor) -> None:
        key = place.module, place.parameter
        if key in self._in_panels:
            self._write_rows(place, place.sent.of(tensor))
            return
        target, source = place.held.of(self._target(key)), place.sent.of(tensor)
        if target.data_ptr() != source.data_ptr():  # otherwise it arrived here, see `room`
            target.copy_(source)
        self._left[key].discard(place.held)
        if not self._left[key]:
            self._pack_if_needed(key)

    def _write_rows(self, place: Place, part: torch.Tensor) -> None:
        packed = self._reader.panels(place.module)
        rows = place.held.rows(self._reader.width(place.module))
        assert packed is not None and rows is not None
        packed.write(rows.start, part.reshape(len(rows), -1))

    def _is_made_of_panels(self, key: _Key) -> bool:
        """Whether only a packed copy exists, and each part fills whole panels of it."""
        module, name = key
        if self._reader.ways(module, name) != ("packed",) or self._reader.parameter(module, name).numel():
            return False
        packed = self._reader.panels(module)
        parts = [view.rows(self._reader.width(module)) for view in self._views[key]]
        height = packed.height if packed is not None else None
        return height is not None and not any(
            rows is None or rows.start % height or rows.stop % height for rows in parts
        )

    def _target(self, key: _Key) -> torch.Tensor:
        """The parameter; in place of an emptied one, a new tensor that becomes the packed weight."""
        parameter = self._reader.parameter(*key)
        if parameter.numel() >= self._sizes[key]:
            return parameter
        if key not in self._staged:
            shape = self._reader.shape(key[0])
            is_filled = shape.numel() == self._sizes[key]
            self._staged[key] = parameter.new_empty(shape) if is_filled else self._held(key)
        return self._staged[key]

    def _held(self, key: _Key) -> torch.Tensor:
        """The packed weight, with the padding that no tensor fills."""
        (way,) = self._reader.ways(*key)
        return self._reader.read(*key, way).clone()

    def _pack_if_needed(self, key: _Key) -> None:
        if not set(self._reader.ways(*key)) & {"packed", "product"}:
            return
        packed, staged = self._reader.panels(key[0]), self._staged.pop(key, None)
        if packed is not None:
            packed.write(0, self._reader.parameter(*key) if staged is None else staged)
            return
        layer = self._modules[key[0]]
        if staged is not None:
            layer.weight = nn.Parameter(staged, requires_grad=False)
        layer.quant_method.process_weights_after_loading(layer)


def _views(places: Places) -> dict[_Key, set[View]]:
    views: dict[_Key, set[View]] = defaultdict(set)
    for place in (place for many in places.values() for place in many if not place.tied):
        views[place.module, place.parameter].add(place.held)
    return views
