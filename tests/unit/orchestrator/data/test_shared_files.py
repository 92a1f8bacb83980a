"""Published data sets, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.data.readers import read_prompts, read_rankings
from orchestrator.errors import DataError

FOLDER = Path(__file__).parents[5] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"{FOLDER} is absent: it holds samples of published data sets"
)


def test_gsm8k_questions_keep_their_answers() -> None:
    records, report = read_prompts(FOLDER / "gsm8k-train.jsonl.gz")
    assert (report.format, report.num_records) == ("question", 4000)
    assert all("####" in record.meta["answer"] for record in records)


def test_hh_rlhf_gives_prompts_and_pairs_that_end_with_the_user() -> None:
    prompts, prompt_report = read_prompts(FOLDER / "hh-rlhf-harmless.jsonl.gz")
    pairs, pair_report = read_rankings(FOLDER / "hh-rlhf-harmless.jsonl.gz")
    assert (prompt_report.num_records, prompt_report.left_out) == (1798, {"already read": 2})
    assert (pair_report.num_records, pair_report.left_out) == (1800, {})
    for record in [*prompts, *pairs]:
        roles = [message.role for message in record.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert {prompt.id for prompt in prompts} == {pair.id for pair in pairs}


def test_a_format_that_is_not_served_is_refused_with_its_fields() -> None:
    with pytest.raises(DataError, match="its fields are: id, conversations"):
        read_prompts(FOLDER / "sharegpt-fastchat.json.gz")
