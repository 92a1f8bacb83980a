"""The section of stage `people`, which waits for judgements of people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.base import Fraction, Positive, PositiveNumber, Section

_ADDRESS = r"^([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):[1-9][0-9]{0,4}$"


class PeopleConfig(Section):
    store: str | None = None
    """Labelling store (docs/labelling.md): path of an SQLite file, or URL of a PostgreSQL database. Null: labels.db in
    the run's folder."""
    address: Annotated[str, Field(pattern=_ADDRESS)] | None = "127.0.0.1:8700"
    """host:port at which the run serves the page while it waits, unless another service has the store. Null: it serves
    none, because somebody runs `rlhf label serve` on the store."""
    guidelines: Path | None = None
    """Text file, shown beside every task by the run's own service."""
    source: Literal["samples", "log"] = "samples"
    """What people judge; samples: those of the newest stage `sample`; log: those of the last step of the newest stage
    `rl`, with which it learned (docs/experience-log.md)."""
    task: Literal["rank", "compare"] = "rank"
    """rank: people order up to 9 different replies to a prompt; compare: they compare the first and the last one."""
    overlap: Positive = 3
    """Number of people who judge an item of the share people.overlap_share; others are judged by one."""
    overlap_share: Fraction = 0.1
    """Share of items that several people judge, which shows how far people agree."""
    items: Positive | None = None
    """Number of items that a round asks for. Null: all prompts of the samples that can be compared."""
    choose: Literal["random", "active"] = "random"
    """How people.items are chosen; active: by what the reward model of an earlier round does not know (see
    docs/labelling.md)."""
    control_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of them that is drawn at random with active, to measure what the choice is worth."""
    judgements: Positive | None = None
    """Number of judgements after which the run continues. Null: all that the stage asks for."""
    deadline_hours: PositiveNumber | None = None
    """Hours after which the run continues with the judgements that there are, counted from the first attempt. Null: it
    waits."""
