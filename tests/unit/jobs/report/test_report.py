from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.report.command import write_report
from jobs.report.data import read_run
from orchestrator.errors import DataError
from orchestrator.evaluation import EVALUATION
from orchestrator.watching.telemetry import Telemetry
from tests.deadlines import scaled
from tests.unit.jobs.run_folder import HOSTILE, NUM_PROMPTS, NUM_STEPS, write_pipeline, write_run


class Page(HTMLParser):
    """Ids, references, tags and text of a page; fails on unclosed tags."""

    VOID = {"meta", "link", "br", "img", "input"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "action"):
                self.references.append(str(value))
            self.references += re.findall(r"url\(([^)]*)\)", str(value))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "demo-1")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    return (finished / "report.html").read_text(encoding="utf-8")


def test_the_page_loads_nothing_from_outside(html):
    page = Page(html)
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert "@import" not in html
    assert "script" not in page.tags


def test_references_inside_the_page_lead_somewhere_and_ids_are_unique(html):
    page = Page(html)
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_all_curves_are_there(html):
    titles = re.findall(r"<figcaption>(.*?) <span", html)
    assert titles == [
        "Reward",
        "Gold score",
        "KL to the reference",
        "Entropy",
        "Response length",
        "Explained variance",
        "Engine mismatch",
        "Time per step",
    ]
    assert html.count("<svg") == len(titles)


def test_colours_of_charts_follow_dark_and_light(html):
    assert "prefers-color-scheme: dark" in html
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "var(--series-1)" in drawings
    assert not re.search(r"(fill|stroke): #(?!none)", drawings)


def test_text_of_samples_is_shown_and_never_markup(html):
    assert HOSTILE not in html
    assert HOSTILE in Page(html).text


def test_the_result_table_says_what_came_of_the_run(finished, html):
    run = read_run(finished)
    comparison = run.comparison
    assert comparison is not None
    assert comparison.num_prompts == NUM_PROMPTS
    text = Page(html).text
    assert f"{comparison.delta_in_sd:+.2f} SD" in text
    assert f"{comparison.low:+.2f} to {comparison.high:+.2f}" in text
    assert f"{comparison.gold_first:.3f}" in text
    assert "74.3 %" in text
    assert f"{NUM_STEPS} of {NUM_STEPS}" in text
    assert "samples_per_prompt" in text
    assert run.status == "finished"


def test_samples_before_and_after_are_of_the_same_prompts(finished, html):
    run = read_run(finished)
    before = {row.prompt_id: row for row in run.evaluations[0]}
    after = {row.prompt_id: row for row in run.evaluations[NUM_STEPS]}
    text = Page(html).text
    for prompt_id in sorted(before)[:12]:
        start = text.index(before[prompt_id].prompt_text)
        assert text.index(before[prompt_id].response_text, start) < text.index(after[prompt_id].response_text, start)


def test_prompts_without_a_score_before_or_after_are_left_out_of_both(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    first, last = (folder / "evaluation" / f"step-{version:06d}.parquet" for version in (0, NUM_STEPS))
    unscored = {first: {"q0001", "q0002"}, last: {"q0002", "q0003"}}
    for file, prompts in unscored.items():
        rows = pq.read_table(file).to_pylist()
        # If excluded on one side only, it would change all numbers.
        spoiled = [{**row, "gold": None if row["prompt_id"] in prompts else row["gold"]} for row in rows]
        spoiled = [{**row, "gold": row["gold"] and 50.0} if row["prompt_id"] == "q0001" else row for row in spoiled]
        pq.write_table(pa.Table.from_pylist(spoiled, schema=EVALUATION), file)
    run = read_run(folder)
    comparison = run.comparison
    assert comparison is not None
    assert (comparison.num_prompts, run.num_left_out) == (NUM_PROMPTS - 3, 3)
    assert comparison.gold_first < 1.0 and comparison.gold_last < 1.0
    write_report(folder)
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert "3 others have no score before or after" in text
    assert "step-000000.parquet: 2 rows without a gold score are left out; failed-step-000000.jsonl says why." in text


def test_a_run_without_any_common_score_is_still_reported(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    file = folder / "evaluation" / "step-000000.parquet"
    rows = [{**row, "gold": None} for row in pq.read_table(file).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=EVALUATION), file)
    write_report(folder)
    run = read_run(folder)
    assert run.comparison is None
    assert any("no prompt was scored in both evaluations" in note for note in run.notes)


def test_best_and_worst_are_the_extremes_of_all_samples(finished):
    run = read_run(finished)
    golds = sorted(row.gold for row in run.evaluations[NUM_STEPS])
    assert [sample.score for sample in run.golds.worst] == golds[:3]
    assert [sample.score for sample in run.golds.best] == golds[::-1][:3]
    assert (run.rewards.best[0].response_text, run.rewards.best[0].step) == (HOSTILE, 3)


def test_a_crashed_run_is_reported_from_what_it_left(tmp_path):
    folder = write_run(tmp_path / "crashed", num_steps=3, finished=False)
    (folder / "config.yaml").unlink()
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "rl", "st')
    event = {"time": 1.7e9 + 2000, "attempt": 1, "stage": "rl", "kind": "stage_failed", "error": "engine 1 <died>"}
    with (folder / "events.jsonl").open("a") as stream:
        stream.write(json.dumps(event) + "\n")
    shard = next((folder / "log" / "step-000002").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:500])
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "Fewer than two evaluations" in text
    assert "failed: engine 1 <died>" in text
    assert "step-000002/shard-0000.parquet can't be read" in text
    assert "config.yaml can't be read" in text
    assert len(read_run(folder).steps) == 3


def test_wall_time_leaves_out_the_pause_between_attempts(tmp_path):
    lines = [
        {"stage": "rl", "kind": "step", "step": step, "attempt": attempt, "time": at, "metrics": {"time/step_s": 10.0}}
        for step, attempt, at in [(0, 1, 110.0), (1, 1, 120.0), (2, 2, 5010.0)]
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    assert (run.wall_s, run.num_attempts) == (30.0, 2)


def test_an_empty_folder_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no metrics and no evaluations yet"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_the_command_ends_with_exit_code_2_and_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "jobs", "report", str(tmp_path / name)],
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        timeout=scaled(60),
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("report: ")
    assert "Traceback" not in result.stderr


def test_the_command_prints_the_path(tmp_path):
    folder = write_run(tmp_path / "demo-2", num_steps=2)
    result = subprocess.run(
        [sys.executable, "-m", "jobs", "report", str(folder)],
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        timeout=scaled(60),
        check=True,
    )
    assert Path(result.stdout.strip()) == folder / "report.html"
    assert (folder / "report.html").stat().st_size > 10_000


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(write_pipeline(tmp_path_factory.mktemp("runs") / "pipeline")).read_text(encoding="utf-8")


def test_a_run_without_rollouts_shows_trainings_evaluation_and_samples(pipeline: str) -> None:
    page = Page(pipeline)
    assert re.findall(r"<figcaption>(.*?) <span", pipeline) == [
        f"{stage}: {name}" for stage in ("sft", "sft-1", "sft-2") for name in ("loss", "learning rate")
    ]
    facts = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td class="muted">(.*?)</td>', pipeline)
    of_sft = ("loss 3.710 → 0.585", "40 optimizer steps, means of the first and last tenth, held out loss 0.625")
    assert facts[:8] == [
        ("Status", "failed: GuardTripped: gold is 0.512, required &gt; 0.6", ""),
        ("sft", *of_sft),
        ("sft-1", *of_sft),
        ("sft-2", *of_sft),
        ("evaluate: length", "31", ""),
        ("evaluate: gold", "0.512", "against 0.25, win rate 0.75"),
        ("evaluate: kl", "1.5", ""),
        ("evaluate: not met", "gold is 0.512, required &gt; 0.6", "evaluate.require"),
    ]
    assert "Steps" not in dict(fact[:2] for fact in facts)
    assert re.findall(r'class="headline">(.*?)<', pipeline) == [
        "evaluate: length 31; evaluate: gold 0.512; evaluate: kl 1.5."
    ]
    assert [f"A {word} reply {row} " in page.text for word in ("warm", "plain") for row in (0, 11)] == [True] * 4
    assert "A warm reply 12 " not in page.text and "start/model" in page.text
    assert "score 7.000 · row 7" in page.text and "Reply 2.7 " in page.text and "Reply 1.7 " not in page.text


def test_its_page_is_as_safe_and_as_readable_in_the_dark(pipeline: str) -> None:
    page = Page(pipeline)
    assert all(reference.startswith("#") for reference in page.references) and "script" not in page.tags
    assert len(page.ids) == len(set(page.ids)) and HOSTILE not in pipeline and HOSTILE in page.text
    drawings = "".join(re.findall(r"<svg.*?</svg>", pipeline, flags=re.DOTALL))
    assert "var(--series-1)" in drawings and not re.search(r"(fill|stroke): #(?!none)", drawings)


def test_damaged_results_of_a_stage_are_noted(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "run")
    (folder / "evaluate" / "result.json").write_text("{}")
    (folder / "stages" / "score-2" / "scores.parquet").write_text("x")
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "evaluate/result.json can't be read" in text and "score-2/scores.parquet can't be read" in text


def test_heads_of_a_reward_model_are_told_beside_its_accuracy(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    heads = {"accuracies": [0.5, 0.625, None], "right": 0.25, "wrong": None}
    with Telemetry(folder, "run", 2, stage="reward_model") as telemetry:
        telemetry.event("trained", held_out_accuracy=0.75, num_pairs=8, heads=heads)
    (accuracy,) = read_run(folder).accuracies
    assert accuracy.value == 0.75
    assert "heads alone 50.0 %, 62.5 %; mean disagreement on pairs: right 0.25" in accuracy.detail


def test_turns_of_an_environment_are_told_from_what_is_learned(tmp_path):
    folder = write_run(tmp_path / "turns")
    shard = next((folder / "log" / "step-000003").rglob("*.parquet"))
    rows = pq.read_table(shard).to_pylist()
    spans = [[True, "<calc>6*7</calc>"], [False, "\n42 & <b>\n"], [True, "#### 42"]]
    episode = {"reward": 9.0, "parts": {}, "error": None, "spans": spans}
    rows[0] |= {"reward": 99.0, "response_text": "all", "meta": json.dumps({"episode": episode})}
    rows[1] |= {"meta": json.dumps({"episode": "a field of the user's data"})}
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(shard)), shard)
    assert read_run(folder).rewards.best[0].spans == tuple(map(tuple, spans))
    html = write_report(folder).read_text(encoding="utf-8")
    parts = re.findall(r'<span class="(learned|written)">([^<]*)</span>', html)
    assert ("learned", "&lt;calc&gt;6*7&lt;/calc&gt;") in parts and ("learned", "#### 42") in parts
    assert ("written", "\n42 &amp; &lt;b&gt;\n") in parts
    assert Page(html).text.count("6*7") == 1
