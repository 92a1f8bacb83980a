"""Finds where a vLLM model keeps each tensor of the trainer, by observing its loader.

The loader gets numbers instead of weights, a distinct one for each element of each tensor. Meanwhile parameters are on
the meta device, and copies into them are recorded instead of made. The numbers show which elements arrive where,
however the loader cuts, stacks, transposes or reorders them, without knowledge of the architecture. No weight changes,
and memory holds at most one tensor of numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import (
    _get_original_loader,
    _place_kernel_tensors,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

from actors.weights.conversion import CheckpointForm
from actors.weights.manifest import listed
from orchestrator.errors import PublishError

_FIRST_NUMBER = 1 << 40  # loaders do not fill parameters with such values
_ATEN = torch.ops.aten
_WRITES = (_ATEN.copy_.default, _ATEN.fill_.Scalar, _ATEN.fill_.Tensor, _ATEN.zero_.default)


@dataclass(frozen=True)
class View:
    """Some elements of a tensor: strides and offset of `as_strided` over its elements in row-major order."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.detach().contiguous()
        return rows.as_strided(self.shape, self.strides, rows.storage_offset() + self.offset)

    def has_whole_rows(self, width: int) -> bool:
        """Whether these are whole rows of a matrix of width `width`."""
        *outer, last = zip(self.shape, self.strides, strict=True) if self.shape else [(0, 0)]
        return last == (width, 1) and not any(step % width for step in (self.offset, *(stride for _, stride in outer)))

    def rows(self, width: int) -> range | None:
        """The rows of a matrix of width `width` that these are. None: not whole rows, or not neighbors in order."""
        steps = [prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        if list(self.strides) != steps or self.offset % width or self.num_elements % width:
            return None
        return range(self.offset // width, (self.offset + self.num_elements) // width)

    def columns(self, width: int, count: int) -> View:
        """The same rows of a matrix that keeps `count` of its `width` columns."""
        strides = (*(stride // width * count for stride in self.strides[:-1]), 1)
        return View((*self.shape[:-1], count), strides, self.offset // width * count)

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Place:
    """A place of elements of one tensor in the engine: `held` of a parameter equals `sent` of the tensor.

    Args:
        tied: not loaded; the module shares the parameter of another module.
    """

    module: str
    parameter: str
    held: View
    sent: View
    tied: bool = False


Places = Mapping[str, tuple[Place, ...]]


def locate(model: Any, form: CheckpointForm) -> Places:
    """Maps the name of each tensor that the engine loads to its places.

    With tensor parallelism these are the places of one worker, which may keep parts of a tensor, or nothing of it
    (actors.weights.taken).

    Raises:
        PublishError: the loader computes with a tensor instead of moving it, or fills a parameter from another source.
    """
    ties = _ties(model)
    with _Loading(model) as loading:
        recorder = _Recorder(loading)
        with recorder, torch.no_grad():
            model.load_weights(form.convert(recorder.numbered(form.specs)))
        recorder.finish(model)
    places: dict[str, list[Place]] = defaultdict(list)
    for name, place in recorder.places:
        places[name].append(place)
        for module, parameter in ties.get((place.module, place.parameter), ()):
            if (module, parameter) != (place.module, place.parameter):
                places[name].append(Place(module, parameter, place.held, place.sent, tied=True))
    # The padding of a vocabulary, which a tied layer shares too.
    recorder.constants += [(other, view) for key, view in recorder.constants for other in ties.get(key, ())]
    found = {name: tuple(dict.fromkeys(many)) for name, many in places.items()}
    _require_filled(model, found, recorder)
    return found


def _require_filled(model: nn.Module, places: Places, recorder: _Recorder) -> None:
    if recorder.computed:
        raise refusal(f"computes with {listed(sorted(recorder.computed))} while it loads them")
    filled: dict[tuple[str, str], int] = defaultdict(int)
    views = {((p.module, p.parameter), p.held) for many in places.values() for p in many}
    for key, view in views | set(recorder.constants):
        filled[key] += view.num_elements
    foreign = [
        f"{module}.{name}"
        for (module, name), size in recorder.parameter_sizes.items()
        if filled[module, name] < size
        and (filled[module, name] or not _is_constant(getattr(model.get_submodule(module), name)))
    ]
    if foreign:
        raise refusal(f"has parameters that no tensor of the trainer fills, or not wholly: {listed(foreign)}")


def refusal(what: str) -> PublishError:
    return PublishError(
        f"vLLM's model {what}, so a publish could not be proved. Set rollout.engine=hf for this architecture."
    )


def _is_constant(tensor: torch.Tensor) -> bool:
    """A scale that is never loaded or changed."""
    return tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())


def _ties(model: nn.Module) -> Mapping[tuple[str, str], list[tuple[str, str]]]:
    """By (module, parameter): all places of the same parameter. Not visible while weights are being loaded."""
    same: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for module, layer in model.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            same[id(parameter)].append((module, name))
    return {key: group for group in same.values() if len(group) > 1 for key in group}


def checkpoint_form(config: VllmConfig) -> CheckpointForm:
    """The model as an engine serves it, without its weights."""
    served = config.model_config
    trusts = served.trust_remote_code
    # If vLLM uses transformers' classes for a model, it decorates them, and they read its config.
    with set_current_vllm_config(config), torch.device("meta"):
        own = AutoConfig.from_pretrained(served.model, trust_remote_code=trusts)
        return CheckpointForm(AutoModelForCausalLM.from_config(own, trust_remote_code=trusts))


class _Loading:
    """Yields a model whose parameters are as before its first load, on the meta device; restores its weights."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.owners: dict[int, tuple[str, str]] = {}
        self.parameter_sizes: dict[tuple[str, str], int] = {}

    def __enter__(self) -> _Loading:
        initialize_layerwise_reload(self._model)
        for module, name, tensor in _tensors(self._model):
            tensor.weight_loader = _get_original_loader(tensor)  # type: ignore[attr-defined]
            self.owners.setdefault(_storage(tensor), (module, name))
            if isinstance(tensor, nn.Parameter):
                self.parameter_sizes[module, name] = tensor.numel()
        return self

    def __exit__(self, *_: object) -> None:
        self._model._do_torchao_reload = self._model._original_do_torchao_reload
        for layer in self._model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                _place_kernel_tensors(layer, info)
                info.reset()


class _Recorder(TorchDispatchMode):
    """Records copies into the parameters of a model without making them."""

    def __init__(self, loading: _Loading) -> None:
        super().__init__()
        self._owners, self.parameter_sizes = loading.owners, loading.parameter_sizes
        self._names: list[str] = []
        self._firsts: list[int] = [_FIRST_NUMBER]
        self.places: list[tuple[str, Place]] = []
        self.constants: list[tuple[tuple[str, str], View]] = []
        self.computed: set[str] = set()
        self._elsewhere: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._latest = torch.empty(0)

    def numbered(self, specs: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields each tensor with a distinct number in each element, counted continuously over all tensors."""
        for name, shape in specs:
            first = self._firsts[-1]
            self._names.append(name)
            self._firsts.append(first + prod(shape))
            self._latest = torch.arange(first, self._firsts[-1], device="cpu").reshape(tuple(shape))
            yield name, self._latest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is _ATEN._to_copy.default and args[0].dtype == torch.int64:
            kwargs.pop("dtype", None)  # numbers do not change
        if func in _WRITES:
            written = torch.as_tensor(args[1] if len(args) > 1 else 0).broadcast_to(args[0].shape)
            owner = self._owners.get(_storage(args[0]))
            if owner is not None:
                self._record(owner, args[0], written, is_copy=func is _ATEN.copy_.default)
                return args[0]
            if written.dtype == torch.int64 and args[0].dtype != torch.int64:
                self._elsewhere.append((args[0], written.clone()))
        return func(*args, **kwargs)

    def finish(self, model: nn.Module) -> None:
        """Checks whether a tensor that was written elsewhere became a parameter: some loaders register one."""
        registered = {_storage(tensor): (module, name) for module, name, tensor in _tensors(model)}
        for target, written in self._elsewhere:
            if _storage(target) in registered:
                self._record(registered[_storage(target)], target, written, is_copy=True)

    def _record(self, owner: tuple[str, str], target: torch.Tensor, numbers: torch.Tensor, *, is_copy: bool) -> None:
        if not numbers.numel():
            return
        # A view of a whole tensor: its strides suffice.
        if numbers.dtype == torch.int64 and _storage(numbers) == _storage(self._latest):
            self.places.append((self._names[-1], Place(*owner, _view(target), _view(numbers))))
            return
        first = int(numbers.flatten()[0]) if numbers.dtype == torch.int64 else 0
        index = bisect_right(self._firsts, first) - 1
        if not 0 <= index < len(self._names):
            if is_copy:
                self.computed.add(self._names[-1])
            else:
                self.constants.append((owner, _view(target)))
            return
        end = self._firsts[index + 1]
        if int(numbers.max()) >= end and len(target) > 1:  # several tensors were stacked
            for one_target, one_numbers in zip(target, numbers, strict=True):
                self._record(owner, one_target, one_numbers, is_copy=is_copy)
            return
        views = _views(target, numbers, self._firsts[index], end)
        if views is None:
            self.computed.add(self._names[index])
        else:
            self.places.append((self._names[index], Place(*owner, *views)))


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(module, name, parameter or buffer)."""
    for module, layer in model.named_modules():
        yield from ((module, name, tensor) for name, tensor in get_layer_tensors(layer).items())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _view(tensor: torch.Tensor) -> View:
    kept = [pair for pair in zip(tensor.shape, tensor.stride(), strict=True) if pair[0] != 1]
    return View(tuple(n for n, _ in kept), tuple(stride for _, stride in kept), int(tensor.storage_offset()))


def _views(target: torch.Tensor, numbers: torch.Tensor, first: int, end: int) -> tuple[View, View] | None:
    """(held, sent): the elements of `target` and, in the same order, those of the tensor with numbers from `first` to
    `end`. None: the numbers have no strides."""
    shape: list[int] = []
    held: list[int] = []
    sent: list[int] = []
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        parts = _radix(numbers[(0,) * dim + (slice(None),) + (0,) * (target.dim() - dim - 1)])
        if parts is None:
            return None
        inner = size
        for part_size, part_stride in parts:
            inner //= part_size
            shape.append(part_size)
            held.append(stride * inner)
            sent.append(part_stride)
    offset = int(numbers.flatten()[0]) - first
    if min(sent, default=0) < 0 or offset + sum((n - 1) * s for n, s in zip(shape, sent, strict=True)) >= end - first:
        return None
    found = View(tuple(shape), tuple(sent), offset)
    if not torch.equal(torch.arange(first, end, device="cpu").as_strided(shape, sent, offset), numbers.reshape(shape)):
        return None
    return View(tuple(shape), tuple(held), int(target.storage_offset())), found


def _radix(line: torch.Tensor) -> list[tuple[int, int]] | None:
    """(size, stride) of nested counters, outermost first, that generate `line`. None: there are none."""
    parts: list[tuple[int, int]] = []
    while len(line) > 1:
        step = int(line[1] - line[0])
        breaks = (line.diff() != step).nonzero()
        size = int(breaks[0]) + 1 if len(breaks) else len(line)
        if len(line) % size:
            return None
        parts.insert(0, (size, step))
        line = line[::size]
    return parts
