"""`make label` to its end, as a person at a terminal meets it: judge, agree to train, read what comes next."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.config.loader import load_config
from orchestrator.run.storage import read_json
from tests.deadlines import scaled
from tests.integration.pipelines import ROOT, write_config
from tests.tiny import tiny_llama, tiny_scorer
from tests.unit.jobs.services.labelling.test_embedded import LINK, answer_all, log_of


@contextmanager
def at_a_terminal(cluster: str, *words: str) -> Iterator[int]:
    """A command whose standard streams are a terminal. Yields the other side of it."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "RAY_ADDRESS": cluster, "COLUMNS": "500"}
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", *words],
        cwd=ROOT,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield ours
        assert process.wait(timeout=scaled(60)) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, wanted: str) -> str:
    """What the command writes until a text matches, or until its end."""
    text = ""
    while not re.search(wanted, text):
        readable, _, _ = select.select([terminal], [], [], scaled(180))
        assert readable, f"nothing for three minutes, after:\n{text}"
        try:
            text += os.read(terminal, 4096).decode("utf-8", "replace")
        except OSError:  # Linux, when the other side has closed
            break
    return text.replace("\r\n", "\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with its reward model and the replies that it learned from."""
    tiny_llama(tmp_path / "base")
    folder = tmp_path / "quickstart-1"
    tiny_scorer(folder / "reward-model")
    section = {"records_per_batch": 2, "micro_batch_tokens": 256, "max_length": 64, "cpus_per_rank": 1, "layers": None}
    prompts = {"path": str(ROOT / "jobs/data/quickstart_prompts.jsonl")}
    tree = {"stages": ["sample", "preferences", "reward_model", "rl"], "reward_model": section, "prompts": prompts}
    write_config(tmp_path, tree).rename(folder / "config.yaml")
    log_of(folder)
    return folder


def test_a_person_judges_agrees_to_train_and_is_shown_what_comes_next(cluster: str, run: Path) -> None:
    before = {path: path.read_bytes() for path in (run / "reward-model").iterdir()}
    with at_a_terminal(cluster, "label", "quickstart", str(run), "--limit", "3", "--no-browser") as terminal:
        link = LINK.search(read_until(terminal, r"judge here: \S+\s"))
        assert link is not None
        assert answer_all(link[1], link[2]) == 3
        judged = read_until(terminal, r"\[y/N\]")
        assert "of 9 pairs of 3 prompts" in judged and "labels.jsonl: your rankings of 3 prompts\n" in judged
        os.write(terminal, b"y\n")
        output = read_until(terminal, "shows replies of that run")
    (made,) = run.parent.glob("quickstart-1-labels-*")
    assert read_json(made / "reward_model.json")["num_records"] == 3
    assert f"the new reward model: {made}/reward-model; that of {run} is as it was" in output
    assert {path: path.read_bytes() for path in (run / "reward-model").iterdir()} == before
    (line,) = (each for each in output.splitlines() if each.startswith("to train the policy with it: "))
    words = shlex.split(line.removeprefix("to train the policy with it: ").partition(";")[0])
    assert words[:3] == ["rlhf", "run", "--config"]
    config = load_config(Path(words[3]), words[4:])
    assert [stage.kind for stage in config.stages] == ["rl"] and config.run.id is None
    assert config.reward.path == str(made / "reward-model")
