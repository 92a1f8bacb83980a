"""The linear digest finds every kind of fault, and digests of parts add up to that of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import pytest
import torch

from actors.weights.digest import Digest, Digests, digest, digest_part

FAULTS = 10_000  # of each kind
SHAPE = (40, 72)
NAME = "model.layers.0.mlp.up_proj.weight"
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int16, torch.int64, torch.bool, torch.complex64]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    numbers = torch.randn(shape, generator=generator(seed)) * 3
    return (numbers > 0) if dtype == torch.bool else numbers.to(dtype)


def total(digests: Iterator[Digest]) -> Digest:
    return sum(digests, Digest(0, 0, 0))


def draws(limit: int, seed: int, count: int = FAULTS) -> list[int]:
    drawn: list[int] = torch.randint(limit, (count,), generator=generator(seed)).tolist()
    return drawn


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_single_bit_is_found(dtype: torch.dtype) -> None:
    tensor = random_tensor(SHAPE, dtype)
    words = tensor.view(torch.uint8).flatten()
    right, missed = digest(tensor, NAME), 0
    for index, bit in zip(draws(len(words), 1, FAULTS // 4), draws(8, 2, FAULTS // 4), strict=True):
        words[index] ^= 1 << bit
        missed += digest(tensor, NAME) == right
        words[index] ^= 1 << bit
    assert missed == 0
    assert digest(tensor, NAME) == right


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_single_element_is_found(dtype: torch.dtype) -> None:
    tensor = random_tensor(SHAPE, dtype)
    words = tensor.view(BITS[dtype]).flatten()
    info = torch.iinfo(words.dtype)
    other = torch.randint(info.min, info.max, (FAULTS // 4,), generator=generator(1), dtype=words.dtype)
    right, missed = digest(tensor, NAME), 0
    for index, word in zip(draws(len(words), 2, FAULTS // 4), other, strict=True):
        kept = words[index].clone()
        words[index] = word
        missed += bool(word != kept) and digest(tensor, NAME) == right
        words[index] = kept
    assert missed == 0


def test_both_sequences_find_every_single_bit() -> None:
    """Odd weights: each of the two alone, with certainty."""
    tensor = random_tensor((8, 16), torch.bfloat16)
    words = tensor.view(torch.uint8).flatten()
    right = digest(tensor, NAME)
    for index in range(len(words)):
        for bit in range(8):
            words[index] ^= 1 << bit
            wrong = digest(tensor, NAME)
            assert wrong.first != right.first and wrong.second != right.second
            words[index] ^= 1 << bit


def test_every_swap_of_two_elements_is_found() -> None:
    tensor = random_tensor(SHAPE, torch.bfloat16)
    flat = tensor.flatten()
    right, missed = digest(tensor, NAME), 0
    for a, b in zip(draws(len(flat), 1), draws(len(flat), 2), strict=True):
        if flat[a] == flat[b]:
            continue
        flat[[a, b]] = flat[[b, a]]
        missed += digest(tensor, NAME) == right
        flat[[a, b]] = flat[[b, a]]
    assert missed == 0
    assert digest(tensor, NAME) == right


def test_every_swap_of_two_rows_and_of_two_columns_is_found() -> None:
    for tensor in (random_tensor(SHAPE, torch.bfloat16), random_tensor(SHAPE, torch.bfloat16).T):
        right = digest(tensor, NAME)
        for a in range(len(tensor)):
            for b in range(a):
                swapped = tensor.clone()
                swapped[[a, b]] = tensor[[b, a]]
                assert digest(swapped, NAME) != right


@pytest.mark.parametrize("dtype", FLOATS)
def test_sign_flips_in_pairs_do_not_cancel(dtype: torch.dtype) -> None:
    """The highest bit of a wide word is the same for every odd weight; here words are bytes."""
    tensor = random_tensor(SHAPE, dtype)
    flat = tensor.flatten()
    right = digest(tensor, NAME)
    for a, b in zip(draws(len(flat), 1, 1000), draws(len(flat), 2, 1000), strict=True):
        if a != b:
            flat[[a, b]] *= -1
            assert digest(tensor, NAME) != right
            flat[[a, b]] *= -1


def test_swapped_tensors_are_found_in_each_and_in_the_sum_over_all() -> None:
    tensors = {f"layers.{i}.weight": random_tensor(SHAPE, torch.bfloat16, seed=i) for i in range(24)}
    right = {name: digest(tensor, name) for name, tensor in tensors.items()}
    for (a, of_a), (b, of_b) in combinations(tensors.items(), 2):
        wrong = right | {a: digest(of_b, a), b: digest(of_a, b)}
        assert wrong[a] != right[a] and wrong[b] != right[b]
        assert total(iter(wrong.values())) != total(iter(right.values()))


@pytest.mark.parametrize("value", [None, 0.0], ids=["random", "zeros"])
def test_every_truncation_is_found(value: float | None) -> None:
    tensor = random_tensor((9, 72), torch.bfloat16)
    if value is not None:
        tensor.fill_(value)
    right = digest(tensor, NAME)
    flat = tensor.flatten()
    for kept in range(len(flat)):
        assert digest_part(flat[:kept], NAME, tensor.shape) != right


def test_another_shape_dtype_or_name_is_another_digest() -> None:
    tensor = random_tensor(SHAPE, torch.bfloat16)
    seen = {
        digest(tensor, NAME),
        digest(tensor, NAME + "_"),
        digest(tensor.T.contiguous(), NAME),
        digest(tensor.reshape(72, 40), NAME),
        digest(tensor.flatten(), NAME),
        digest(tensor.view(torch.float16), NAME),
    }
    assert len(seen) == 6


Cut = Callable[[torch.Tensor], Iterator[tuple[torch.Tensor, int, tuple[int, ...] | None]]]


def by_rows(tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, None]]:
    for start in range(0, len(tensor), 7):
        yield tensor[start : start + 7], start * tensor[0].numel(), None


def by_columns(tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, None]]:
    width = max(5, tensor.shape[-1] // 13)
    for start in range(0, tensor.shape[-1], width):
        yield tensor[..., start : start + width].contiguous(), start, None


def by_range(tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, None]]:
    flat = tensor.flatten()
    bounds = [0, 1, 2, 11, 12, len(flat) // 3, len(flat) // 2 + 1, len(flat) - 1, len(flat)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        yield flat[start:end], start, None


def by_stride(tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, tuple[int, ...]]]:
    flat = tensor.flatten()
    for start in range(3):
        yield flat[start::3], start, (3,)


def transposed(tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, tuple[int, ...]]]:
    yield tensor.movedim(-1, 0).contiguous(), 0, (1, *tensor.stride()[:-1])


@pytest.mark.parametrize("cut", [by_rows, by_columns, by_range, by_stride, transposed])
@pytest.mark.parametrize("shape", [(40, 72), (37, 67), (200, 1), (6, 10, 65), (12, 3, 5), (2, 65_701)], ids=str)
def test_parts_add_up(cut: Cut, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(shape, torch.bfloat16)
    parts = list(cut(tensor))
    assert sum(part.numel() for part, *_ in parts) == tensor.numel()
    assert total(digest_part(part, NAME, shape, *where) for part, *where in parts) == digest(tensor, NAME)


@pytest.mark.parametrize("cut", [by_rows, by_columns, by_range])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_every_dtype_add_up(cut: Cut, dtype: torch.dtype) -> None:
    tensor = random_tensor((37, 67), dtype)
    added = total(digest_part(part, NAME, tensor.shape, *where) for part, *where in cut(tensor))
    assert added == digest(tensor, NAME)
    assert digest(torch.zeros_like(tensor), NAME) != added


def test_heads_that_are_reordered_keep_their_digest() -> None:
    """(heads, q k v, width) held as (q k v, heads, width), the strides of places.View."""
    tensor = random_tensor((6, 64), torch.bfloat16)
    held = tensor.reshape(2, 3, 64).transpose(0, 1).contiguous()
    assert digest_part(held, NAME, tensor.shape, 0, (64, 192, 1)) == digest(tensor, NAME)


def test_a_part_in_another_place_or_a_missing_or_doubled_part_is_found() -> None:
    tensor = random_tensor(SHAPE, torch.bfloat16)
    left, right = tensor[:, :36], tensor[:, 36:]
    parts = digest_part(left, NAME, SHAPE), digest_part(right, NAME, SHAPE, 36)
    assert parts[0] + parts[1] == digest(tensor, NAME)
    assert digest_part(left, NAME, SHAPE, 36) + digest_part(right, NAME, SHAPE) != digest(tensor, NAME)
    assert parts[0] != digest(tensor, NAME)
    assert parts[0] + parts[1] + parts[1] != digest(tensor, NAME)


def test_a_part_that_does_not_fit_is_refused() -> None:
    for part, where in (
        (torch.zeros(2, 72), (39 * 72, None)),
        (torch.zeros(2, 73), (0, None)),
        (torch.zeros(73), (39 * 72, None)),
        (torch.zeros(2, 2, 2), (0, None)),
        (torch.zeros(2), (-1, (1,))),
        (torch.zeros(2, 2), (0, (1,))),
    ):
        with pytest.raises(ValueError, match="part"):
            digest_part(part, NAME, SHAPE, *where)


def test_the_digest_is_the_sum_that_the_docstring_states() -> None:
    """Bytes times factors mod 2^64, with Python's integers; factors from tensors with a single one. They are odd, times
    the value of the byte in its word of four."""
    tensor = random_tensor((2, 65), torch.bfloat16)
    signed = tensor.view(torch.int8).flatten().tolist()
    sums = [0, 0]
    for index, value in enumerate(signed):
        one = torch.zeros_like(tensor)
        one.view(torch.int8).view(-1)[index] = 1
        unit = digest(one, NAME)
        value_in_word = 1 << 8 * (index % 130 % 4)
        assert all(total % value_in_word == 0 and total // value_in_word % 2 for total in (unit.first, unit.second))
        sums = [(total + value * weight) % 2**64 for total, weight in zip(sums, (unit.first, unit.second), strict=True)]
    assert [*sums] == [digest(tensor, NAME).first, digest(tensor, NAME).second]


def test_extreme_bytes_are_summed_exactly() -> None:
    """Below 2^31, and without saturation in the 16-bit steps of CPUs without VNNI."""
    for value in (-128, 127):
        tensor = torch.full((1, 1 << 17), value, dtype=torch.int8)
        ones = torch.ones_like(tensor)
        whole, unit = digest(tensor, NAME), digest(ones, NAME)
        assert (whole.first, whole.second) == (value * unit.first % 2**64, value * unit.second % 2**64)


def test_a_collection_adds_parts_by_name() -> None:
    tensor, norm = random_tensor(SHAPE, torch.bfloat16), random_tensor((72,), torch.float32)
    digests = Digests()
    digests.add("a", tensor[:11], SHAPE)
    digests.add("norm", norm)
    digests.add("a", tensor[11:], SHAPE, 11 * 72)
    assert digests.result() == {"a": digest(tensor, "a"), "norm": digest(norm, "norm")}
    assert Digests().result() == {}


def golden(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    numbers = (torch.arange(torch.Size(shape).numel()) * 37 % 251 - 125).reshape(shape)
    return digest(numbers.to(dtype), "model.embed_tokens.weight").hex


def test_golden_values() -> None:
    """Both sides of a publish may run different versions: a change of the function must be deliberate."""
    assert golden((40, 72), torch.bfloat16) == "1680-68ce78d996f84972564e00a3bc9e3002"
    assert golden((5, 7), torch.float32) == "8c-304a9bbe64d20000db6bd0872d860000"
    assert golden((), torch.float64) == "8-0c8dcd7d2ea5c000c0770b820e19c000"
    assert golden((3, 70_001), torch.int8) == "33453-a8a5ae08621cca2fb67a0df375891147"
