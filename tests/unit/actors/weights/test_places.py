"""Finds the places of elements from their values: hand-worked, for each way in which loaders move weights."""

from __future__ import annotations

import torch

from actors.weights.places import View, _radix, _views

FIRST, END = 100, 124  # element numbers of a tensor of 24 elements


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(FIRST, END).reshape(shape)


def found(target: torch.Tensor, numbers: torch.Tensor) -> tuple[View, View]:
    views = _views(target, numbers, FIRST, END)
    assert views is not None
    return views


def test_rows_of_a_fused_matrix() -> None:
    parameter = torch.empty(10, 4)
    held, sent = found(parameter[3:9], numbered(6, 4))
    assert (held.offset, held.strides, held.num_elements) == (12, (4, 1), 24)
    assert sent == View((6, 4), (4, 1), 0)


def test_a_transposed_matrix() -> None:
    held, sent = found(torch.empty(4, 6), numbered(6, 4).T)
    assert held == View((4, 6), (6, 1), 0)
    assert sent == View((4, 6), (1, 4), 0)


def test_heads_that_are_reordered_and_copied() -> None:
    """(heads, q k v, width) becomes (q k v, heads, width): NeoX, BLOOM."""
    loaded = numbered(2, 3, 4).transpose(0, 1).reshape(6, 4)
    held, sent = found(torch.empty(6, 4), loaded)
    assert sent == View((3, 2, 4), (4, 12, 1), 0)
    assert held == View((3, 2, 4), (8, 4, 1), 0)


def test_a_part_of_a_tensor_in_one_of_many_experts() -> None:
    parameter = torch.empty(5, 4, 4)
    held, sent = found(parameter[2, 1:4], numbered(6, 4)[3:])
    assert held == View((3, 4), (4, 1), 2 * 16 + 4)
    assert sent == View((3, 4), (4, 1), 12)


def test_views_read_what_was_written() -> None:
    tensor, parameter = torch.randn(2, 3, 4), torch.zeros(8, 4)
    parameter[1:7] = tensor.transpose(0, 1).reshape(6, 4)
    held, sent = found(parameter[1:7], numbered(2, 3, 4).transpose(0, 1).reshape(6, 4))
    assert torch.equal(held.of(parameter), sent.of(tensor))


def test_whole_rows_that_are_neighbors_are_a_range() -> None:
    parameter = torch.empty(10, 4)
    assert found(parameter[3:9], numbered(6, 4))[0].rows(4) == range(3, 9)
    assert View((4,), (1,), 8).rows(4) == range(2, 3)
    assert View((), (), 5).rows(1) == range(5, 6)
    assert View((2, 4), (4, 1), 6).rows(4) is None  # starts within a row
    assert View((3, 2), (4, 1), 0).rows(4) is None  # half rows
    assert View((3, 4), (8, 1), 0).rows(4) is None  # every second row
    assert View((4, 6), (1, 4), 0).rows(4) is None  # transposed


def test_a_shuffle_is_no_place() -> None:
    shuffled = numbered(24)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    assert _views(torch.empty(24), shuffled, FIRST, END) is None


def test_what_is_computed_from_a_tensor_is_no_place() -> None:
    assert _views(torch.empty(24), numbered(24) * 2, FIRST, END) is None
    assert _views(torch.empty(24), numbered(24) + 1, FIRST, END) is None
    assert _views(torch.empty(24), numbered(24).flip(0), FIRST, END) is None


def test_radix_finds_nested_counters() -> None:
    assert _radix(torch.tensor([7])) == []
    assert _radix(torch.tensor([0, 1, 2, 3])) == [(4, 1)]
    assert _radix(torch.tensor([0, 1, 10, 11, 20, 21])) == [(3, 10), (2, 1)]
    assert _radix(torch.tensor([5, 5, 5])) == [(3, 0)]
    assert _radix(torch.tensor([0, 1, 2, 4])) is None


def test_columns_of_a_view_that_has_whole_rows() -> None:
    rows = View((6, 4), (4, 1), 12)
    assert rows.has_whole_rows(4)
    assert rows.columns(4, 2) == View((6, 2), (2, 1), 6)
    assert not View((4, 6), (1, 4), 0).has_whole_rows(4)
    assert not View((6, 2), (4, 1), 0).has_whole_rows(4)
    assert not View((), (), 0).has_whole_rows(4)
