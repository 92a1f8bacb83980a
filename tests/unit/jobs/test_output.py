"""Console output never ends a command, whatever happens to its destination."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import scaled

ROOT = Path(__file__).resolve().parents[3]
TALKS = r"""
import sys, time
from rich.table import Table
from jobs.command import out, err, say
from jobs.cluster.submit import write_raw
for index in range(200):
    say(f"step {index}: ± 0.5 \u2192 \U0001f600 \udcff [bold]not markup[/]" + "x" * 1000)
    time.sleep(0.0005)
table = Table("Gain \u00b1", title="the end")
table.add_row("caf\u00e9 \udcff")
out.print(table)
write_raw("raw \u2026 \udcff\n")
err.print("told \u2192")
open(sys.argv[1], "w").write("done")
"""


def talk(tmp_path: Path, shell: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, received output, and the command's final file."""
    done = tmp_path / "done"
    (tmp_path / "talk.py").write_text(TALKS)
    command = f"'{sys.executable}' '{tmp_path / 'talk.py'}' '{done}'"
    ran = subprocess.run(
        ["bash", "-c", shell.replace("COMMAND", command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        timeout=scaled(120),
        check=False,
    )
    text = ran.stdout.decode("utf-8", "replace") + ran.stderr.decode("utf-8", "replace")
    return ran.returncode, text, done.read_text() if done.exists() else ""


@pytest.mark.parametrize(
    ("shell", "environment"),
    [
        ("COMMAND | head -1 > /dev/null; exit ${PIPESTATUS[0]}", {}),
        ("COMMAND 2>&1 | head -1 > /dev/null; exit ${PIPESTATUS[0]}", {}),
        ("COMMAND | true; exit ${PIPESTATUS[0]}", {}),
        ("COMMAND > /dev/full", {}),
        ("COMMAND > /dev/full 2>&1", {}),
        ("COMMAND >&-", {}),
        ("COMMAND >&- 2>&- <&-", {}),
        ("COMMAND", {"PYTHONIOENCODING": "ascii"}),
        ("COMMAND", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("COMMAND", {"PYTHONIOENCODING": "latin-1"}),
        ("COMMAND", {"PYTHONIOENCODING": "utf-8"}),
        ("COMMAND", {"TERM": "dumb", "COLUMNS": "1"}),
    ],
)
def test_output_never_ends_a_command(tmp_path: Path, shell: str, environment: dict[str, str]) -> None:
    code, text, done = talk(tmp_path, shell, **environment)
    assert (code, done) == (0, "done"), text[-2000:]
    assert "Error" not in text
    assert "Exception ignored" not in text


def test_text_that_an_encoding_lacks_is_replaced_and_the_rest_is_shown(tmp_path: Path) -> None:
    _, text, _ = talk(tmp_path, "COMMAND", PYTHONIOENCODING="ascii")
    assert "step 199: ? 0.5 ? ? " in text
    assert "caf?" in text
    assert "raw ?" in text


def test_a_terminal_that_closes_never_ends_a_command(tmp_path: Path) -> None:
    leader, follower = os.openpty()
    done = tmp_path / "done"
    command: Any = [sys.executable, "-c", TALKS, str(done)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    os.read(leader, 100)
    os.close(leader)
    assert process.wait(120) == 0
    assert done.read_text() == "done"
