"""A set of digests at 8 to 24 bytes each, which finds repeated rows in files of any length."""

from __future__ import annotations

from array import array

_FIRST_SIZE = 2**10
_MAX_FILL = 0.75


class Digests:
    """The first 64 bits of digests, in an open-addressing table. Two of 10 million collide with probability 3e-6."""

    def __init__(self) -> None:
        self._slots = _empty(_FIRST_SIZE)
        self._num = 0

    def __len__(self) -> int:
        return self._num

    @property
    def num_bytes(self) -> int:
        return 8 * len(self._slots)

    def add(self, digest: bytes) -> bool:
        """Adds a digest. False: it was there."""
        key = int.from_bytes(digest[:8], "little") or 1  # 0 marks a free slot
        slots, mask = self._slots, len(self._slots) - 1
        place = key & mask
        while found := slots[place]:
            if found == key:
                return False
            place = (place + 1) & mask
        slots[place] = key
        self._num += 1
        if self._num > _MAX_FILL * len(slots):
            self._grow()
        return True

    def _grow(self) -> None:
        slots, mask = _empty(2 * len(self._slots)), 2 * len(self._slots) - 1
        for key in self._slots:
            if key:
                place = key & mask
                while slots[place]:
                    place = (place + 1) & mask
                slots[place] = key
        self._slots = slots


def _empty(size: int) -> array[int]:
    return array("Q", bytes(8 * size))
