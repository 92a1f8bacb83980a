"""Ordinary YAML is read; YAML that expands or loses values is refused immediately."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from orchestrator.config.loader import load_config
from orchestrator.config.yaml_text import MAX_VALUES, MAX_YAML_BYTES, parse_yaml
from orchestrator.errors import ConfigError


def _levels(line: str, first: str) -> str:
    """Twelve lines, each referring to the previous one nine times: 9 to the power of 12 values."""
    return first + "".join(line.format(i, ", ".join([f"*l{i - 1}"] * 9)) + "\n" for i in range(1, 12))


BOMBS = {
    "aliases": _levels("l{0}: &l{0} [{1}]", "l0: &l0 [x]\n"),
    "merges": _levels("l{0}: &l{0} {{{{<<: [{1}]}}}}".replace("{{{{", "{{").replace("}}}}", "}}"), "l0: &l0 {x: 1}\n"),
    "keys": _levels("l{0}: &l{0} {{? [{1}] : x}}", "l0: &l0 [x]\n"),
    "itself": "a: &a [*a]",
    "merged itself": "a: &a {<<: *a}",
    "long": "#" * (MAX_YAML_BYTES + 1),
    "values": "a: [" + "1," * (MAX_VALUES + 1) + "]",
    "nested": "[" * 60_000,
    "dashes": "- " * 60_000,
    "whole number": "a: " + "9" * 100_000,
    "hexadecimal": "a: 0x" + "f" * 100_000,
    "no text": "a: \x00",
    "base 60": "a: 1" + ":59" * 40_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_a_moment(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(BOMBS[name], encoding="utf-8")
    before = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert time.process_time() - before < 10 and len(str(caught.value)) < 2000 and str(path) in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"rl={BOMBS[name]}"])
    assert len(str(caught.value)) < 2000


def test_anchors_and_merges_of_people_are_read() -> None:
    text = "base: &base {x: 1, y: 2}\none: {<<: *base, y: 3}\ntwo: [*base, *base]\n"
    assert parse_yaml(text) == {"base": {"x": 1, "y": 2}, "one": {"x": 1, "y": 3}, "two": [{"x": 1, "y": 2}] * 2}
    assert parse_yaml("") is None


@pytest.mark.parametrize("text", ["rl: {steps: 1}\nmodel: {}\nrl: {max_staleness: 0}", "rl: {steps: 1, steps: 2}"])
def test_a_key_that_comes_twice_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="duplicate key"):
        load_config(path)


def test_thousands_of_unknown_keys_make_a_short_message(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"k{i}: 1\n" for i in range(4000)), encoding="utf-8")
    with pytest.raises(ConfigError, match="and 3980 more"):
        load_config(path)
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["a." * 50_000 + "b=1"])
    assert len(str(caught.value)) < 2000
