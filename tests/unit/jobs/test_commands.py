"""One entry point for all commands: help on one screen, valid examples, completion, no early imports."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.__main__ import app, command_of
from jobs.commands import COMMANDS, PROGRAM
from tests.deadlines import scaled

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("numpy", "pyarrow", "ray", "torch", "transformers", "vllm", "deepspeed", "yaml", "rich")
SCREEN_LINES, SCREEN_COLUMNS = 24, 100
NAMED = re.compile(r"(?:(?:`|^ *|: )rlhf|python -m jobs) ([a-z][a-z-]+)", re.MULTILINE)
BY_MODULE = re.compile(r"-m (jobs\.[a-z_]+)")
LINE = re.compile(r"^ *rlhf +(.+)$", re.MULTILINE)


def texts() -> dict[str, str]:
    """Files that mention commands, except those about the past."""
    found = [path for pattern in ("*.md", "docs/*.md", "Makefile", "Dockerfile") for path in ROOT.glob(pattern)]
    found += [path for folder in ("jobs", "actors", "orchestrator", "k8s") for path in (ROOT / folder).rglob("*.*")]
    texts = {}
    for path in found:
        if path.suffix in (".md", ".py", ".yaml", ".j2", "") and path.name != "CHANGELOG.md":
            texts[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    return texts


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": str(SCREEN_COLUMNS), **environment},
        capture_output=True,
        text=True,
        timeout=scaled(60),
        check=False,
    )


def test_the_help_fits_on_one_screen_and_lists_every_command() -> None:
    done = run("--help")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert len(lines) <= SCREEN_LINES and max(map(len, lines)) <= SCREEN_COLUMNS
    listed = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :] if line.startswith("  ")]
    assert listed[: len(COMMANDS)] == list(COMMANDS)
    assert "..." not in "".join(lines[lines.index("Commands:") :]), "a summary is truncated"


def test_help_and_the_completion_of_names_import_no_command_and_nothing_heavy() -> None:
    code = (
        "import sys, typer\n"
        "from jobs.__main__ import main\n"
        "sys.argv = ['rlhf', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"wanted = {HEAVY!r}\n"
        "jobs = [name for name in sys.modules if name.startswith('jobs.')]\n"
        "print([name for name in wanted if name in sys.modules], sorted(jobs), file=sys.stderr)\n"
    )
    for environment in ({}, {"_RLHF_COMPLETE": "complete_bash", "COMP_WORDS": "rlhf re", "COMP_CWORD": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=scaled(60),
            check=False,
        )
        assert done.stderr.strip() == "[] ['jobs.__main__', 'jobs.commands', 'jobs.stops']"


@pytest.mark.parametrize(
    ("words", "count", "expected"),
    [
        ("rlhf re", 1, ["reward-model", "report", "replay"]),
        ("rlhf why --js", 2, ["--json"]),
        ("rlhf check --ray", 2, ["--ray-address"]),
    ],
)
def test_a_shell_completes_commands_and_their_options(words: str, count: int, expected: list[str]) -> None:
    done = run(_RLHF_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(count))
    assert done.stdout.split() == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_ends_with_an_example_that_it_takes(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], prog_name=PROGRAM, env={"COLUMNS": str(SCREEN_COLUMNS)})
    assert result.exit_code == 0
    *_, heading, example = result.stdout.rstrip().splitlines()
    assert heading.strip() == "Example:"
    assert example.strip() == f"rlhf {name} {COMMANDS[name].example}"
    assert len(result.stdout.splitlines()) <= 2 * SCREEN_LINES
    takes(name, shlex.split(COMMANDS[name].example))


def takes(name: str, arguments: list[str]) -> None:
    """Raises if an option is unknown or an argument is missing."""
    command_of(name).make_context(name, arguments)


def test_an_unknown_command_names_the_nearest_and_ends_with_2() -> None:
    done = run("chek")
    assert done.returncode == 2 and "Did you mean 'check'?" in done.stderr


def test_a_command_gets_its_arguments_and_gives_its_exit_code(tmp_path: Path) -> None:
    done = run("why", str(tmp_path))
    assert done.returncode == 2 and "holds no run" in done.stderr
    done = run("check", "rl.stepz=1")
    assert done.returncode == 2 and "rl.steps" in done.stderr


def test_the_installed_script_is_this_program() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert list(scripts) == [PROGRAM]
    module, _, function = scripts[PROGRAM].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_every_command_that_is_named_anywhere_exists() -> None:
    named = {(path, name) for path, text in texts().items() for name in NAMED.findall(text)}
    assert len({name for _, name in named}) >= len(COMMANDS) - 1, "the pattern matches too little"
    assert sorted((path, name) for path, name in named if name not in COMMANDS) == []


def test_nothing_names_a_command_by_its_module() -> None:
    """Except the one that only `make docs` runs."""
    named = {(path, name) for path, text in texts().items() for name in BY_MODULE.findall(text)}
    assert {(path, name) for path, name in named if name != "jobs.configuration_docs"} == set()


def test_every_command_line_in_the_documents_is_one_that_the_command_takes() -> None:
    lines = [line for path, text in texts().items() if path.endswith(".md") for line in LINE.findall(text)]
    assert len(lines) > 8
    for line in lines:
        name, *arguments = shlex.split(line.replace("<run id>", "run"), comments=True)
        takes(name, arguments)
