"""`--from` and `--only` as users give them, with real trainings of a model of two layers."""

from __future__ import annotations

import re
from pathlib import Path

from orchestrator.run.lineage import read_lineage
from orchestrator.run.storage import read_json
from orchestrator.watching.telemetry import read_lines
from tests.deadlines import scaled
from tests.integration.pipelines import finish, start
from tests.integration.test_sft import write_config

KEYS = {"stages": ["sft", {"name": "more", "kind": "sft"}]}


def digests(run: Path) -> dict[str, str]:
    return {made.stage: made.sha256 for made in read_lineage(run)}


def test_stages_run_again_with_other_keys(base: Path, cluster: str, tmp_path: Path) -> None:
    config, run = write_config(base, tmp_path, **KEYS), tmp_path / "whole"
    few = "sft.epochs=1"
    output = finish(start(config, cluster, "whole", few))
    assert "report.html" in output and (run / "report.html").exists()
    before = digests(run)

    refused = start(config, cluster, "whole", few, "sft.learning_rate=0.001", "--from", "more")
    output, _ = refused.communicate(timeout=scaled(180.0))
    assert refused.returncode == 2 and "sft.learning_rate: 0.01 -> 0.001  (matters)" in output
    assert digests(run) == before and not (run / "set-aside").exists()

    stages = "stages=[sft, {name: more, kind: sft, set: {sft.learning_rate: 0.001}}]"
    finish(start(config, cluster, "whole", few, stages, "--from", "more"))
    after = digests(run)
    assert after["sft"] == before["sft"] and after["more"] != before["more"]
    aside = run / "set-aside" / "001" / "stages" / "more"
    assert read_json(aside / "sft.json")["loss"] > 0 and (aside / "sft" / "model.safetensors").exists()

    finish(start(config, cluster, "whole", few, stages, "--from", "sft"))
    assert digests(run) == after, "the same config makes the same bits again"
    assert (run / "set-aside" / "002" / "sft.json").exists()
    steps = [(line["stage"], line["step"]) for line in read_lines(run / "metrics.jsonl") if line["kind"] == "step"]
    assert steps == [(stage, step) for stage in ("sft", "more") for step in range(20)]
    output = finish(start(config, cluster, "whole", few, stages))
    assert "nothing is left to do" in re.sub(r"\s+", " ", output) and "stale" not in output
