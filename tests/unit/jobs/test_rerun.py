"""`--from` and `--only`: a stage runs again with another config, what others made stays, and nothing is deleted."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.pipeline import run_stages
from jobs.prepare import without_prompts
from jobs.rerun import rerun_of, stale_lines
from jobs.stages.stage import Artifact, Stage, StageJob
from jobs.stages.table import STAGES, stages_of
from jobs.why.explain import explain
from jobs.why.reader import read_facts
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree, load_kept_config
from orchestrator.errors import ConfigError
from orchestrator.run.folder import RunFolder, existing_run, open_run
from orchestrator.run.lineage import read_lineage
from orchestrator.watching.telemetry import METRICS_FILE, read_lines

ROOT = Path(__file__).resolve().parents[3]


class Made(Stage):
    """Writes what it read and the keys that it sees, and a line of metrics."""

    def __init__(self, kind: str, key: str, *reads: str) -> None:
        self.kind, self.key, self.needs, self.sections = kind, key, reads, (key.partition(".")[0],)
        self.leaves = (f"{kind}.log",)

    def reads(self, config: Config) -> Sequence[str]:
        return self.needs

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(self.kind, f"{self.kind}.txt"),)

    async def run(self, job: StageJob) -> Mapping[str, Any]:
        section, name = self.key.split(".")
        value = getattr(getattr(job.config, section), name)
        read = "".join(path.read_text() for path in job.inputs.values())
        with job.telemetry.step(0) as record:
            record({"value": float(value)})
        job.telemetry.evaluation(0, {"value": float(value)})
        (job.run.place / self.leaves[0]).mkdir()
        job.output(self.kind).write_text(f"{self.kind} {value} of ({read})")
        return {}


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (
        Made("a", "sample.prompts"),
        Made("b", "rl.steps", "a"),
        Made("c", "labeller.noise_std", "b"),
        Made("d", "evaluation.prompts", "a"),
    ):
        monkeypatch.setitem(STAGES, stage.kind, stage)


def config_of(root: Path, stages: Sequence[Any] = ("a", "b", "c", "d"), **sections: Any) -> Config:
    tree = {"stages": list(stages), "run": {"root": str(root), "id": "demo"}, "telemetry": {"prometheus_port": None}}
    seen = {"sample": {"prompts": 64}, "evaluation": {"prompts": 64}, "labeller": {"noise_std": 0.2}}
    return config_from_tree({**tree, "reward": {"path": "x"}, **seen, **sections}, source="the test")


def run(config: Config, **options: str) -> tuple[RunFolder, list[str]]:
    lines: list[str] = []
    rerun = rerun_of(config, begin=options.get("begin"), only=options.get("only")) if options else None
    if rerun is None:
        folder = open_run(config)
    else:
        folder = open_run(config, compare=rerun.compare, prepare=lambda run: rerun.set_aside(lines.append, run))
    work = run_stages(
        config,
        folder,
        without_prompts(None),  # type: ignore[arg-type]
        lines.append,
        only=rerun.only if rerun else None,
    )
    asyncio.run(work)
    return folder, lines


def stage_lines(folder: Path) -> list[str]:
    return [line["stage"] for line in read_lines(folder / METRICS_FILE) if line["kind"] == "step"]


def made(folder: RunFolder, *kinds: str) -> list[str]:
    return [(folder.path / f"{kind}.txt").read_text() for kind in kinds]


def test_from_sets_a_stage_and_its_readers_aside_and_makes_them_again(tmp_path: Path) -> None:
    run(config_of(tmp_path, rl={"steps": 1}))
    folder, lines = run(config_of(tmp_path, rl={"steps": 2, "prompts_per_step": 16}), begin="b")
    assert made(folder, "a", "b", "c", "d") == [
        "a 64 of ()",
        "b 2 of (a 64 of ())",
        "c 0.2 of (b 2 of (a 64 of ()))",
        "d 64 of (a 64 of ())",
    ]
    aside = folder.path / "set-aside" / "001"
    assert lines == [f"set aside what earlier attempts made in b, c: {aside}"]
    assert (aside / "b.txt").read_text() == "b 1 of (a 64 of ())" and (aside / "c.txt").exists()
    assert sorted(path.name for path in aside.iterdir()) == [
        "b.log", "b.txt", "c.log", "c.txt", "lineage.json", METRICS_FILE,
    ]  # fmt: skip
    assert {entry["stage"] for entry in json.loads((aside / "lineage.json").read_text())["artifacts"]} == {"b", "c"}
    assert stage_lines(aside) == ["c", "b"]
    assert stage_lines(folder.path) == ["a", "d", "b", "c"]
    assert len(read_lines(folder.path / METRICS_FILE)) == 8 and len(read_lines(aside / METRICS_FILE)) == 4
    attempts = {entry.stage: entry.attempt for entry in read_lineage(folder.path)}
    assert attempts == {"a": 1, "d": 1, "b": 2, "c": 2}
    assert load_kept_config(folder.path / "config.yaml").rl.steps == 2
    facts = read_facts(folder.path, 0.0)
    assert facts is not None and set(explain(facts).standing.stages.values()) == {"finished"}
    assert run(config_of(tmp_path, rl={"steps": 2, "prompts_per_step": 16}))[1] == [], "nothing is left or stale"


def test_a_change_that_an_earlier_stage_sees_is_refused_and_nothing_is_moved(tmp_path: Path) -> None:
    folder, _ = run(config_of(tmp_path))
    for sections, key in (
        ({"sample": {"prompts": 8}}, "sample.prompts: 64 -> 8  (matters)"),
        ({"evaluation": {"prompts": 8}, "rl": {"steps": 3}}, "evaluation.prompts: 64 -> 8  (matters)"),
        ({"model": {"path": "other"}}, r"model.path: .*(matters)"),
        ({"stages": [{"name": "a", "kind": "a", "set": {"sample.prompts": 9}}, "b", "c", "d"]}, "stages: .*(matters)"),
    ):
        with pytest.raises(ConfigError, match=re.escape(key).replace(r"\.\*", ".*")):
            run(config_of(tmp_path, **sections), begin="b")
    assert not (folder.path / "set-aside").exists() and len(made(folder, "a", "b", "c", "d")) == 4


def test_a_stage_that_has_not_begun_may_see_changes(tmp_path: Path) -> None:
    run(config_of(tmp_path), only="a")
    folder, _ = run(config_of(tmp_path, rl={"steps": 3}, evaluation={"prompts": 8}), only="b")
    assert made(folder, "b") == ["b 3 of (a 64 of ())"]


def test_only_runs_one_stage_and_what_read_from_it_is_stale(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run(config)
    folder, lines = run(config_of(tmp_path, sample={"prompts": 8}), only="a")
    assert made(folder, "a", "b") == ["a 8 of ()", "b 20 of (a 64 of ())"]
    assert (folder.path / "set-aside" / "001" / "a.txt").read_text() == "a 64 of ()"
    stale = [line for line in lines if "stale" in line]
    assert [re.sub("[0-9a-f]{8}", "X", line) for line in stale] == [
        f"WARNING {name}.txt of stage '{name}' is stale: it was made from another a.txt: sha256 X, now X. "
        f"Make it again: --from {name}"
        for name in ("b", "d")
    ]
    facts = read_facts(folder.path, 0.0)
    assert facts is not None and explain(facts).state == "finished"
    changed = config_of(tmp_path, sample={"prompts": 8})
    for name in ("b", "d"):
        run(changed, begin=name)
    assert not list(stale_lines(stages_of(changed), folder))
    assert made(folder, "c", "d") == ["c 0.2 of (b 20 of (a 8 of ()))", "d 64 of (a 8 of ())"]


def test_only_continues_a_stage_that_has_not_finished(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    folder, _ = run(config, only="a")
    (folder.path / ".b.txt.work").mkdir()
    assert rerun_of(config, begin=None, only="b").again == frozenset()
    assert rerun_of(config_of(tmp_path, rl={"steps": 3, "prompts_per_step": 16}), begin=None, only="b").again == {"b"}


def test_only_needs_what_it_reads_and_from_needs_a_run(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for options, problem in (
        (
            {"only": "b"},
            r"'b' reads a of stage 'a', which has not made it in run\.id=demo\. Run that first \(--only a\)",
        ),
        ({"begin": "b"}, r"--from b .* run\.id=demo names no run"),
        ({"only": "bb"}, r"--only: no stage 'bb' is in stages; did you mean 'b'\?"),
        ({"only": "a", "begin": "a"}, r"give one of them"),
    ):
        with pytest.raises(ConfigError, match=problem):
            run(config, **options)
    run(config, only="a")
    assert existing_run(config) is not None
    with pytest.raises(ConfigError, match=r"--from: no stage 'x' is in stages; there are: a, b, c, d\."):
        run(config, begin="x")


def test_a_stage_under_its_own_name_is_set_aside_with_its_folder(tmp_path: Path) -> None:
    config = config_of(tmp_path, ("a", {"name": "more", "kind": "b", "set": {"rl.steps": 5}}))
    folder, _ = run(config)
    run(config_of(tmp_path, ("a", {"name": "more", "kind": "b", "set": {"rl.steps": 6}})), begin="more")
    assert (folder.path / "stages" / "more" / "b.txt").read_text() == "b 6 of (a 64 of ())"
    assert (folder.path / "set-aside" / "001" / "stages" / "more" / "b.txt").read_text() == "b 5 of (a 64 of ())"


def test_the_sections_of_a_stage_are_those_that_its_work_reads() -> None:
    """A section that some stages claim must be claimed by each stage whose work mentions it, besides in estimates."""
    claimed = {section for stage in STAGES.values() for section in stage.sections}
    assert claimed <= set(Config.model_fields)
    for kind, stage in STAGES.items():
        path = ROOT / "jobs" / "stages" / "work" / f"{kind}.py"
        if stage.sections and path.exists():
            parts = ast.parse(path.read_text()).body
            code = "\n".join(ast.unparse(part) for part in parts if getattr(part, "name", "") != "sizes")
            read = set(re.findall(r"config\.([a-z_]+)", code)) & claimed
            assert read <= set(stage.sections), kind
