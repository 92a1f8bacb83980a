"""A service that is killed while judgements are sent. `python -m tests.chaos.labelling` does it twenty times."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.labelling import killed

NUM_JUDGEMENTS = 150


def test_no_judgement_is_lost_or_counted_twice_when_the_service_is_killed(tmp_path: Path) -> None:
    found = killed(tmp_path, NUM_JUDGEMENTS, num_kills=3, num_labellers=3)
    assert found.num_retries > 0
    assert found.is_each_there_once(NUM_JUDGEMENTS)
