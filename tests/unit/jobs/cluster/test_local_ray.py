"""The folder of a local Ray: private, short enough for sockets, and removed after dead launchers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jobs.cluster import local_ray
from jobs.cluster.listener import Listener
from jobs.cluster.local_ray import LONGEST_TEMPORARY, PREFIX, LocalRay, private_folder, remove_leftovers
from jobs.quickstart import keep_logs
from orchestrator.errors import CapacityError

ROOT = Path(__file__).resolve().parents[4]
DIES = """
import os, sys
from pathlib import Path
from jobs.cluster.local_ray import private_folder
with private_folder(Path(sys.argv[1])) as folder:
    (folder / "token").write_text("secret")
    print(folder, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_the_folder_of_a_live_launcher_stays_and_that_of_a_dead_one_goes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DIES, str(tmp_path)]
    dead = Path(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip())
    assert (dead / "token").exists()
    with private_folder(tmp_path) as alive:
        assert alive.stat().st_mode & 0o777 == 0o700
        remove_leftovers(tmp_path)
        assert alive.exists()
        assert not dead.exists()
    assert not alive.exists()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "lock").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    (tmp_path / f"{PREFIX}file").touch()
    (tmp_path / f"{PREFIX}other").mkdir()  # without a lock: from another program, or just being created
    remove_leftovers(tmp_path)
    assert (target / "lock").exists()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_long_temporary_folder_is_passed_over_and_without_any_the_way_out_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * LONGEST_TEMPORARY)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.delenv("TEMP", raising=False)
    monkeypatch.delenv("TMP", raising=False)
    assert local_ray._temporary() == Path("/tmp")
    monkeypatch.setattr(local_ray.os, "access", lambda *_: False)
    with pytest.raises(CapacityError, match=f"none of {long}, /tmp, /var/tmp .*at most {LONGEST_TEMPORARY} bytes"):
        local_ray._temporary()


def test_every_try_has_a_token_of_its_own_that_only_this_user_reads(tmp_path: Path) -> None:
    path = tmp_path / "token"
    tokens = [local_ray._new_token(path) for _ in range(2)]
    assert tokens[0] != tokens[1]
    assert path.read_text() == tokens[1]
    assert path.stat().st_mode & 0o777 == 0o600


def test_logs_that_are_kept_are_out_of_others_reach_although_ray_opens_its_folders(tmp_path: Path) -> None:
    ray = LocalRay("127.0.0.1:1", "http://127.0.0.1:2", "secret", tmp_path, Listener(psutil.Process(), 2))
    ray.logs.mkdir(parents=True)
    ray.logs.chmod(0o777)
    (ray.logs / "raylet.out").write_text("said")
    keep_logs(ray, tmp_path / "runs" / "ray-logs" / "job")
    kept = tmp_path / "runs" / "ray-logs" / "job"
    assert kept.stat().st_mode & 0o777 == 0o700
    assert (kept / "logs" / "raylet.out").read_text() == "said"
