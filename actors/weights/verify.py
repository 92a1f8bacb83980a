"""Verifies that a vLLM model computes with the sent weights: reads them back from its layers.

It compares digests, so it need not keep the sent weights. These contain no -0 and no subnormals, which products would
not return. A layer that holds a part of a tensor (tensor parallelism) is compared with that part of what arrived, after
the whole had the trainer's digest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from actors.weights.canonical import flushed
from actors.weights.digest import digest, digest_of_rows, digest_part, row_width
from actors.weights.manifest import TensorSpec, Verify, listed
from actors.weights.places import Place, Places, View
from actors.weights.readback import Reader, Way
from orchestrator.errors import PublishError

SAMPLED_FRACTION = 1 / 16
MIN_SAMPLED_COLUMNS = 8


@dataclass(frozen=True)
class _Reading:
    """One parameter, read in one way."""

    module: str
    parameter: str
    way: Way


@dataclass(frozen=True)
class _Expected:
    """What one place must return: the digest of a part of tensor `name`, which has the shape `whole`."""

    name: str
    whole: tuple[int, ...]
    place: Place
    digest: str

    def is_in(self, held: torch.Tensor, columns: View | None) -> bool:
        """Args:
        held: the place's parameter, or some of its columns.
        columns: view of the place in these columns; None: of the whole parameter.
        """
        if columns is not None:
            return digest(columns.of(held), self.name).hex == self.digest
        return _digest_at(self.place.held.of(held), self.name, self.whole, self.place) == self.digest

    def rows(self, width: int) -> tuple[range, range] | None:
        """The rows of the parameter and of the tensor, both of this width. None: the place is not made of rows."""
        held, sent = self.place.held.rows(width), self.place.sent.rows(width)
        return (held, sent) if held is not None and sent is not None and row_width(self.whole) == width else None

    def is_in_sums(self, sums: torch.Tensor, rows: tuple[range, range], dtype: torch.dtype) -> bool:
        """Args:
        sums: of each row of the parameter, see words.row_sums.
        """
        held, sent = rows
        found = digest_of_rows(sums[held.start : held.stop], sent.start, self.name, dtype, self.whole)
        return found.hex == self.digest


class Verifier:
    """Compares the sent weights with those that the layers of one model compute with.

    Args:
        reader: reader of a vLLM model.
        places: result of `locate` for that model.
        mode: "full" reads everything back; "sampled" reads a random part of the input columns of prepacked layers and
            everything else; "checksums" reads nothing back.
        seed: seed of the random part, different for each publish.
    """

    def __init__(self, reader: Reader, places: Places, *, mode: Verify, seed: int) -> None:
        self._reader, self._places, self._mode, self._seed = reader, places, mode, seed
        self._expected: dict[_Reading, list[_Expected]] = defaultdict(list)
        self._names: set[str] = set()

    def proves(self, spec: TensorSpec) -> bool:
        """Whether `compare` reads every place of a tensor back against the trainer's digest itself, so that the tensor
        need not be compared when it is received."""
        places = self._places.get(spec.name, ())
        return (
            self._mode == "full"
            and bool(places)
            and all(
                place.sent.num_elements == spec.num_elements
                and self._reader.parameter(place.module, place.parameter).dtype == spec.torch_dtype
                for place in places
            )
        )

    def expect(self, name: str, tensor: torch.Tensor, sent: str) -> None:
        """Records the digest that each place of `name` must return. `sent` is the digest of `tensor`."""
        if self._mode == "checksums":
            return
        self._names.add(name)
        for place in self._places.get(name, ()):
            value = tensor.to(self._reader.parameter(place.module, place.parameter).dtype)
            for way in self._reader.ways(place.module, place.parameter):
                reading = _Reading(place.module, place.parameter, way)
                columns = self._columns(reading)
                if columns is not None:
                    expected = digest(flushed(place.sent.of(value)[..., columns]), name).hex
                elif value is tensor and place.sent.num_elements == tensor.numel():
                    expected = sent
                else:
                    expected = _digest_at(flushed(place.sent.of(value)), name, tensor.shape, place)
                self._expected[reading].append(_Expected(name, tuple(tensor.shape), place, expected))

    @torch.inference_mode()
    def compare(self) -> int:
        """Reads back and compares; returns the number of tensors compared.

        Raises:
            PublishError: naming the Hugging Face tensors that a layer does not compute with.
        """
        stale: dict[str, str] = {}
        for reading, parts in self._expected.items():
            for part in self._differing(reading, parts):
                stale[part.name] = f"{part.name} (in {reading.module})"
        if stale:
            raise PublishError(
                f"the engine does not compute with the published weights of {listed(stale.values())}. "
                "It is out of service until a publish succeeds; restart it if this repeats."
            )
        return len(self._names)

    def _differing(self, reading: _Reading, parts: Sequence[_Expected]) -> Iterator[_Expected]:
        """The parts that a layer does not hold as they were sent."""
        width = self._reader.width(reading.module) if reading.way in ("packed", "product") else 0
        panels = self._reader.panels(reading.module) if reading.way == "packed" else None
        in_rows = [(part, rows) for part in parts if panels is not None and (rows := part.rows(width)) is not None]
        if panels is not None and len(in_rows) == len(parts):
            sums = panels.row_sums()
            yield from (part for part, rows in in_rows if not part.is_in_sums(sums, rows, panels.dtype))
            return
        columns = self._columns(reading)
        held = self._reader.read(reading.module, reading.parameter, reading.way, columns)
        for part in parts:
            view = None if columns is None else part.place.held.columns(width, len(columns))
            if not part.is_in(held, view):
                yield part

    def _columns(self, reading: _Reading) -> torch.Tensor | None:
        """The columns of a product to read; None: all."""
        if self._mode == "full" or reading.way != "product" or reading not in self._sampled:
            return None
        width = self._reader.width(reading.module)
        count = min(width, max(MIN_SAMPLED_COLUMNS, int(width * SAMPLED_FRACTION)))
        order = torch.randperm(width, generator=torch.Generator().manual_seed(self._seed))
        return order[:count].sort().values

    @cached_property
    def _sampled(self) -> set[_Reading]:
        """Products whose parts are all whole rows, so that a part of the columns can be compared."""
        whole: dict[_Reading, bool] = defaultdict(lambda: True)
        for places in self._places.values():
            for place in places:
                reading = _Reading(place.module, place.parameter, "product")
                if "product" in self._reader.ways(place.module, place.parameter):
                    whole[reading] &= place.held.has_whole_rows(self._reader.width(place.module))
        return {reading for reading, is_whole in whole.items() if is_whole}


def _digest_at(part: torch.Tensor, name: str, whole: Sequence[int], place: Place) -> str:
    """The digest of the part of a tensor that a place holds."""
    return digest_part(part, name, whole, place.sent.offset, place.sent.strides).hex
