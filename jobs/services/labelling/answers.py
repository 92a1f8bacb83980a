"""Answers that people give, one class for each kind of task.

The page numbers replies by their place. `stored` numbers them by their index in the item, by the order that was shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from jobs.services.labelling.refusals import Unfit

MAX_TEXT = 32_000
Flag = Literal["spam", "off_topic", "wrong_language", "personal_data", "harmful", "rude", "wrong_facts", "cut_off"]
FLAGS: tuple[str, ...] = get_args(Flag)


def _plain(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty")
    if "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text contains characters that are no text")
    return text


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    def stored(self, order: Sequence[int]) -> Mapping[str, Any]:  # noqa: ARG002  answers share one signature
        """The answer by index of the item's replies; `order` has the index at each place. Raises Unfit."""
        return self.model_dump()


class Rank(_Answer):
    """`ranks`: of each reply, 1 is the best; equal ones are a tie, null is not rankable."""

    kind: Literal["rank"]
    ranks: Annotated[list[Annotated[int, Field(ge=1, le=9)] | None], Field(min_length=2, max_length=9)]

    def stored(self, order: Sequence[int]) -> Mapping[str, Any]:
        _require(len(self.ranks) == len(order), f"{len(order)} replies, but {len(self.ranks)} ranks")
        levels = sorted({rank for rank in self.ranks if rank is not None})
        ranks: list[int | None] = [None] * len(order)
        for index, rank in zip(order, self.ranks, strict=True):
            ranks[index] = None if rank is None else levels.index(rank) + 1
        return {"kind": self.kind, "ranks": ranks}


class Compare(_Answer):
    """`preference`: below 0 the first reply is better, above 0 the second, by how much; 0 is a tie."""

    kind: Literal["compare"]
    preference: Annotated[int, Field(ge=-3, le=3)]

    def stored(self, order: Sequence[int]) -> Mapping[str, Any]:
        return {"kind": self.kind, "preference": self.preference if list(order) == [0, 1] else -self.preference}


class _Rating(_Answer):
    """A rating, 5 is the best, or flags, or both."""

    rating: Annotated[int, Field(ge=1, le=5)] | None
    flags: Annotated[list[Flag], Field(max_length=len(FLAGS))] = []

    def stored(self, order: Sequence[int]) -> Mapping[str, Any]:  # noqa: ARG002  answers share one signature
        _require(self.rating is not None or bool(self.flags), "the answer has neither a rating nor a flag")
        return {**self.model_dump(), "flags": sorted(set(self.flags))}


class Rate(_Rating):
    kind: Literal["rate"]


class Review(_Rating):
    """Of a text that another person wrote."""

    kind: Literal["review"]


class _Text(_Answer):
    text: Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_plain)]


class Write(_Text):
    """The assistant's reply."""

    kind: Literal["write"]


class Prompt(_Text):
    """A message of the user: the first one, or the next one of a conversation."""

    kind: Literal["prompt"]


Answer = Annotated[Rank | Compare | Rate | Write | Prompt | Review, Field(discriminator="kind")]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,64}$")]


class Judgement(BaseModel):
    """What the page sends. `id` is made by the page, once; `seconds` is how long the person looked at the task."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    id: Id
    showing: Id
    seconds: Annotated[float, Field(ge=0, le=1e7)]
    answer: Answer


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise Unfit("unfit", problem)
