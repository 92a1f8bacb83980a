from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from orchestrator.watching.metrics import METRICS, PHASES, ROLES, lookup, prometheus_name, to_markdown

DOCS = Path(__file__).parents[4] / "docs" / "metrics.md"
OF_EVERY_STEP = """
reward/mean reward/std reward/min reward/max reward/failed kl/per_response kl/per_token kl/coefficient
response/length_mean response/cut_by_length response/without_eos engine/mismatch engine/mismatch_k3
policy/entropy policy/clip_fraction policy/approx_kl policy/ratio_max policy/loss policy/grad_norm
policy/learning_rate critic/loss critic/clip_fraction critic/explained_variance critic/grad_norm
critic/learning_rate time/step_s tokens/generated_per_s tokens/learned_per_s tokens/total
publish/tensors_verified publish/bytes publish/verify_s evaluation/gold_mean
""".split()


@pytest.mark.parametrize(
    "name",
    [
        *OF_EVERY_STEP,
        *(f"time/{phase}_s" for phase in PHASES),
        *(f"idle/{role}" for role in ROLES),
        *(f"memory/{role}_rss_bytes" for role in ROLES),
    ],
)
def test_the_catalogue_holds_what_the_design_asks_for(name):
    assert METRICS[name].help


def test_reward_parts_are_found_under_their_template():
    assert lookup("reward/part/style") is METRICS["reward/part/<name>"]
    assert lookup("reward/partial") is None
    assert lookup("no/such") is None


def test_prometheus_names_are_valid_and_distinct():
    names = {
        name: prometheus_name(name) for name in [*METRICS, "reward/part/a-b", "reward/part/a.b", "reward/part/a_b"]
    }
    assert all(re.fullmatch(r"rlhf_[a-zA-Z0-9_]+", name) for name in names.values())
    assert len(set(names.values())) == len(names)
    assert names["reward/mean"] == "rlhf_reward_mean"
    assert names["tokens/total"] == "rlhf_tokens_total"


def test_the_document_is_what_the_catalogue_says():
    assert DOCS.read_text(encoding="utf-8") == to_markdown(), (
        "regenerate it: python -c 'from orchestrator.watching.metrics import to_markdown; "
        'print(to_markdown(), end="")\' > docs/metrics.md'
    )


def test_the_dashboard_shows_metrics_that_exist_and_what_people_are_waited_for():
    dashboard = json.loads((DOCS.parents[1] / "k8s/monitoring/dashboard.json").read_text(encoding="utf-8"))
    shown = [target["expr"].partition("{")[0] for panel in dashboard["panels"] for target in panel["targets"]]
    assert set(shown) <= {prometheus_name(name) for name in METRICS}
    assert {"rlhf_people_waiting", "rlhf_people_missing"} <= set(shown)


def test_every_metric_is_a_row_of_the_document():
    rows = [line for line in to_markdown().splitlines() if line.startswith("| `")]
    for metric in METRICS.values():
        assert sum(row.startswith(f"| `{metric.name}` |") for row in rows) == 1
    cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    assert set(cells) == {4, 5}
