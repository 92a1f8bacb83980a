"""`rlhf lineage`: the tree of what a run made, with what each artifact was made from."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from jobs.__main__ import app
from orchestrator.run.lineage import Made, record


def invoke(run: Path) -> tuple[int, list[str]]:
    done = CliRunner().invoke(app, ["lineage", str(run)], env={"COLUMNS": "200"})
    return done.exit_code, done.output.splitlines()


def made(path: str, stage: str, digest: str, reads: dict[str, str] | None = None, **more: object) -> Made:
    found = reads or {}
    return Made(
        kind=path.partition(".")[0],
        path=path,
        stage=stage,
        attempt=2,
        sha256=digest * 64,
        config_sha256="c" * 64,
        commit="b" * 40 + "+",
        reads={name.partition(".")[0]: name for name in found},
        read_sha256={name: value * 64 for name, value in found.items()},
        **more,  # type: ignore[arg-type]
    )


def test_every_artifact_stands_above_what_it_was_made_from(tmp_path: Path) -> None:
    record(tmp_path, made("samples.parquet", "sample", "1", contents={"prompts.path": "f" * 64}))
    record(tmp_path, made("scores.parquet", "score", "2", {"samples.parquet": "1"}))
    reads = {"samples.parquet": "1", "scores.parquet": "2"}
    record(tmp_path, made("selected.jsonl", "select", "3", reads, result={"path": "x", "metrics": {"gold": 0.51234}}))
    code, lines = invoke(tmp_path)
    assert code == 0
    assert lines[0] == f"run {tmp_path.name}"
    assert lines[1:4] == [
        "└── selected.jsonl  selected, made by select in attempt 2",
        "    sha256 33333333, config cccccccc, commit bbbbbbbb+",
        "    gold 0.5123",
    ]
    assert lines[4].strip() == "├── samples.parquet  samples, made by sample in attempt 2"
    assert lines[6].strip(" │└─") == "prompts.path  sha256 ffffffff, from outside the run"
    assert [line.strip(" │└─") for line in lines if "above" in line] == ["samples.parquet  (above)"]
    assert not any("STALE" in line for line in lines)


def test_an_artifact_whose_input_was_made_again_is_stale(tmp_path: Path) -> None:
    record(tmp_path, made("samples.parquet", "sample", "1"))
    record(tmp_path, made("scores.parquet", "score", "2", {"samples.parquet": "1"}))
    record(tmp_path, made("samples.parquet", "sample", "9"))
    _, lines = invoke(tmp_path)
    assert "    STALE: it was made from another samples.parquet: sha256 11111111, now 99999999" in lines


def test_a_folder_without_lineage_is_refused(tmp_path: Path) -> None:
    code, lines = invoke(tmp_path)
    assert code == 2 and "has no lineage.json" in lines[0]
