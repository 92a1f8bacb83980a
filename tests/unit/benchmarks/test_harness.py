"""The arithmetic of the benchmarks' harness."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.harness import (
    Figure,
    Pairs,
    measure_pairs,
    measure_turns,
    plain_figure,
    ratio_figure,
    read_results,
    write_result,
)
from benchmarks.table import draw, show


def test_pairs_are_measured_a_b_b_a() -> None:
    order: list[str] = []

    def contender(name: str, value: float) -> float:
        order.append(name)
        return value

    pairs = measure_pairs(lambda: contender("A", 3.0), lambda: contender("B", 2.0), pairs=3)
    assert "".join(order) == "ABBAAB"
    assert pairs == Pairs([3.0] * 3, [2.0] * 3)


def test_measurements_of_many_contenders_stay_with_them() -> None:
    counts = iter(range(6))
    measured = measure_turns([lambda: next(counts), lambda: next(counts), lambda: next(counts)], rounds=2)
    assert measured == [[0, 5], [1, 4], [2, 3]]


def test_a_ratio_is_taken_in_each_pair_and_their_median_is_the_figure() -> None:
    figure = ratio_figure("x", Pairs([10.0, 30.0, 8.0], [10.0, 10.0, 4.0]), "tokens/s", target=1.8)
    assert (figure.value, figure.low, figure.high) == (2.0, 1.0, 3.0)
    assert (figure.ours, figure.reference, figure.pairs) == (10.0, 10.0, 3)


@pytest.mark.parametrize(
    ("better", "target", "met"),
    [("higher", 2.0, True), ("higher", 2.1, False), ("lower", 2.0, True), ("lower", 1.9, False), ("lower", None, None)],
)
def test_a_target_is_met_on_its_own_side(better: str, target: float | None, met: bool | None) -> None:
    figure = plain_figure("x", [1.0, 2.0, 5.0], "s", better=better, target=target)  # type: ignore[arg-type]
    assert figure.met is met
    assert figure.reference is None


def test_results_are_read_back_as_written_with_their_machine(tmp_path: Path) -> None:
    figures: list[Figure] = [plain_figure("x", [1.0], "s", better="lower", target=2.0, detail="d")]
    written = write_result("one", figures, folder=tmp_path)
    assert read_results(tmp_path) == [written]
    assert written.machine["cores"] >= 1


def test_table_and_picture_take_every_kind_of_figure(tmp_path: Path) -> None:
    figures = [
        plain_figure("growth", [0.0], "MB", better="lower", target=50.0),
        ratio_figure("ratio", Pairs([1.0], [2.0]), "tokens/s", target=0.95),
        plain_figure("for information", [1.0], "s"),
    ]
    console = Console(width=200, record=True, file=io.StringIO())
    show([write_result("kinds", figures, folder=tmp_path)], console)
    assert "missed" in console.export_text()
    assert draw(figures).count("<svg") == 1
