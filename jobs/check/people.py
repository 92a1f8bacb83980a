"""Check of stage `people`: what people will be asked for, and whether their store can be reached."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from jobs.prepare import find_data
from jobs.services.labelling.store import Store
from jobs.stages.people import asked_of
from jobs.stages.sample import sampled
from jobs.stages.stage import Found
from orchestrator.config.config import Config
from orchestrator.data.inputs import read_text
from orchestrator.errors import ConfigError, DataError


def check_people(config: Config, found: Found) -> str | None:
    """Raises:
    ConfigError: the store's folder is missing, or its URL is unusable.
    DataError: the guidelines can't be read.
    StorageError: the database does not answer.
    """
    people = config.people
    if people.guidelines is not None:
        read_text(find_data(people.guidelines), f"guidelines {people.guidelines}", DataError)
    if people.store is not None:
        _require(people.store)
    if found.prepared is None:
        return None
    is_log = config.people.source == "log"
    num_prompts = asked_of(config)[0] if is_log else len(sampled(config, found.prepared))
    num_items = min(num_prompts, people.items or num_prompts)
    num_judgements = round(num_items * (1 + (people.overlap - 1) * people.overlap_share))
    waits = "" if people.deadline_hours is None else f", for at most {people.deadline_hours:g} h"
    return (
        f"people: the run waits for about {num_judgements} judgements of up to {num_items} prompts{waits}, which no "
        "estimate of time contains"
    )


def _require(place: str) -> None:
    if "://" in place:
        with closing(Store(place)):
            return
    if not Path(place).expanduser().absolute().parent.is_dir():
        raise ConfigError(f"people.store={place}: there is no such folder; create it, or give another path.")
