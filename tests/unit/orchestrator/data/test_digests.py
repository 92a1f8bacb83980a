"""The set of seen digests is exact, in a few bytes each."""

from __future__ import annotations

import hashlib

from orchestrator.data.digests import Digests


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def test_a_digest_is_new_once() -> None:
    seen = Digests()
    assert [seen.add(digest(number)) for number in range(5000)] == [True] * 5000
    assert [seen.add(digest(number)) for number in range(5000)] == [False] * 5000
    assert len(seen) == 5000


def test_digests_that_share_a_slot_and_the_one_of_zeros_are_kept_apart() -> None:
    seen = Digests()
    keys = [number.to_bytes(8, "little") + bytes(24) for number in (0, 1024, 2048, 3072)]
    assert [seen.add(key) for key in keys] == [True] * 4
    assert [seen.add(key) for key in keys] == [False] * 4


def test_a_table_takes_at_most_24_bytes_for_a_digest() -> None:
    seen = Digests()
    for number in range(100_000):
        seen.add(digest(number))
        assert len(seen) < 1000 or seen.num_bytes <= 24 * len(seen)
