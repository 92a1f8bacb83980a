"""A run depends on the content of its files: changed files are refused, moved files are not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs import contents as contents_module
from jobs.contents import contents, file_digest
from jobs.resolve import resolved
from jobs.stages.table import stages_of
from jobs.stages.work.replay import read_run_folder
from orchestrator.config.config import Config
from orchestrator.config.loader import load_config, to_yaml
from orchestrator.errors import ConfigError
from orchestrator.run.folder import RunFolder, check_run_folder, open_run, restore_lost
from orchestrator.run.mirror import Mirror
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def files(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(model, tmp_path / "policy")
    shutil.copytree(model, tmp_path / "reward")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    (tmp_path / "preferences.jsonl").write_text('{"prompt": "Why?", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    (tmp_path / "package").mkdir()
    # The check must not import it.
    (tmp_path / "package" / "__init__.py").write_text("raise SystemExit(0)")
    (tmp_path / "package" / "my_rules.py").write_text("def brevity(*_): return 1.0")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def config(files: Path, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "stages": ["reward_model", "rl"],
        "run": {"root": str(files / "runs"), "id": "demo", "cache": str(files / "cache")},
        "model": {
            "path": str(files / "policy"),
            "chat_template": str(files / "template.jinja"),
            "dtype": "float32",
        },
        "prompts": {"path": str(files / "prompts.jsonl")},
        "preferences": {"path": str(files / "preferences.jsonl")},
        "reward": {"name": "model", "path": str(files / "reward")},
        "evaluation": {"prompts": 4, "gold": "package.my_rules:brevity"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return Config.model_validate(tree)


def opened(files: Path, **changes: Any) -> RunFolder:
    return open_run(resolved(config(files, **changes), lambda _: None))


def append(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b" ")


CHANGES = {
    "prompts.path": "prompts.jsonl",
    "preferences.path": "preferences.jsonl",
    "model.chat_template": "template.jinja",
    "model.path": "policy/model.safetensors",
    "reward.path": "reward/tokenizer.json",
    "rule package.my_rules:brevity": "package/my_rules.py",
}


@pytest.mark.parametrize(("name", "file"), CHANGES.items())
def test_a_file_that_changed_under_its_path_is_refused_until_it_is_accepted(files: Path, name: str, file: str) -> None:
    first = opened(files)
    assert set(load_config(first.path / "config.yaml").run.contents) == set(CHANGES)
    assert opened(files).notes == ()
    append(files / file)
    with pytest.raises(ConfigError, match=rf"what {name} holds: digest .* \(matters\)") as refused:
        opened(files)
    assert "run.accept_changed_files=true" in str(refused.value)
    with pytest.raises(ConfigError, match=name):
        check_run_folder(resolved(config(files), lambda _: None))
    accepted = opened(files, run__accept_changed_files=True)
    assert any(f"what {name} holds" in note for note in accepted.notes)
    assert opened(files, run__accept_changed_files=True).notes == ()


def test_files_that_moved_are_the_same_run(files: Path) -> None:
    opened(files)
    (files / "prompts.jsonl").rename(files / "moved.jsonl")
    (files / "policy").rename(files / "moved-policy")
    (files / "template.jinja").rename(files / "moved.jinja")
    moved = opened(
        files,
        prompts__path=str(files / "moved.jsonl"),
        model__path=str(files / "moved-policy"),
        model__chat_template=str(files / "moved.jinja"),
    )
    assert sorted(note.split(": ")[1] for note in moved.notes) == ["model.chat_template", "model.path", "prompts.path"]


def test_files_that_moved_and_changed_are_not(files: Path) -> None:
    opened(files)
    shutil.copy(files / "prompts.jsonl", files / "other.jsonl")
    append(files / "other.jsonl")
    with pytest.raises(ConfigError, match=r"prompts\.path.*\(matters\)"):
        opened(files, prompts__path=str(files / "other.jsonl"))


def test_another_function_of_the_same_file_is_another_rule(files: Path) -> None:
    opened(files)
    with pytest.raises(ConfigError, match=r"evaluation\.gold.*\(matters\)"):
        opened(files, evaluation__gold="package.my_rules:other")


def test_new_times_and_names_of_files_that_do_not_count_change_nothing(files: Path) -> None:
    opened(files)
    os.utime(files / "prompts.jsonl", (1, 1))
    (files / "policy" / "README.md").write_text("read me")
    assert opened(files).notes == ()


def test_a_run_from_before_digests_were_kept_goes_on_and_keeps_them(files: Path) -> None:
    run = opened(files)
    kept = load_config(run.path / "config.yaml")
    bare = kept.model_copy(update={"run": kept.run.model_copy(update={"contents": {}})})
    (run.path / "config.yaml").write_text(to_yaml(bare))
    opened(files)
    append(files / "prompts.jsonl")
    with pytest.raises(ConfigError, match=r"what prompts\.path holds"):
        opened(files)


def test_what_can_not_be_read_is_left_to_the_checks(files: Path) -> None:
    missing = config(files, prompts__path=str(files / "none.jsonl"), model__path=str(files / "none"))
    assert {"prompts.path", "model.path"}.isdisjoint(contents(missing))


def test_a_replay_from_other_weights_is_refused(files: Path) -> None:
    run = opened(files)
    append(files / "prompts.jsonl")
    read_run_folder(run.path)
    append(files / "policy" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"start from other weights than run demo did: what model\.path holds"):
        read_run_folder(run.path)


def test_a_run_that_comes_back_from_its_mirror_is_compared_too(files: Path) -> None:
    mirror = str(files / "mirror")
    run = opened(files, run__mirror=mirror)
    Mirror(mirror, "demo").push(run.path, attempt=1)
    shutil.rmtree(run.path)
    append(files / "prompts.jsonl")
    assert restore_lost(config(files, run__mirror=mirror))
    with pytest.raises(ConfigError, match=r"what prompts\.path holds"):
        opened(files, run__mirror=mirror)


def test_large_files_are_sampled_at_their_size_their_ends_and_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents_module, "WHOLE_BYTES", 1 << 20)
    path = tmp_path / "weights.bin"
    size = 8 << 20
    path.write_bytes(bytes(size))
    before = file_digest(path)
    assert file_digest(path) == before
    seen = set()
    for change in (0, size - 1, size // 255):
        with path.open("r+b") as stream:
            stream.seek(change)
            stream.write(b"x")
        seen.add(file_digest(path))
    append(path)
    assert len(seen | {before, file_digest(path)}) == 5


def test_files_of_stages_under_one_key_are_told_apart(files: Path) -> None:
    (files / "more.jsonl").write_text('{"prompt": "What?", "chosen": "a", "rejected": "b"}\n')
    again = {"name": "again", "kind": "reward_model", "set": {"preferences.path": str(files / "more.jsonl")}}
    tree = config(files).model_dump(mode="json")
    chosen = Config.model_validate({**tree, "stages": ["reward_model", again, "rl"]})
    found = contents(chosen)
    assert found["preferences.path"] == file_digest(files / "preferences.jsonl")
    assert found["preferences.path of again"] == file_digest(files / "more.jsonl")
    kept = chosen.model_copy(update={"run": chosen.run.model_copy(update={"contents": found})})
    first, second, _ = stages_of(kept)
    assert "preferences.path" in first.outside and "preferences.path of again" not in first.outside
    assert "preferences.path of again" in second.outside and "preferences.path" not in second.outside


def test_the_digest_of_a_mixture_covers_its_sources(files: Path) -> None:
    mixture = files / "mixture.yaml"
    mixture.write_text("sources: [{path: prompts.jsonl}, {path: preferences.jsonl}]")
    before = contents(config(files, prompts__path=str(mixture)))["prompts.path"]
    (files / "preferences.jsonl").write_text('{"prompt": "Which?", "chosen": "a", "rejected": "b"}\n')
    assert contents(config(files, prompts__path=str(mixture)))["prompts.path"] != before
