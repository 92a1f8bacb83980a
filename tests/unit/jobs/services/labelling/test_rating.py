"""Agreement of ratings and reviews: rows worked by hand, and simulated people, one of whom rates everything alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.services.labelling.agreement.alpha import alphas
from jobs.services.labelling.agreement.given import Given
from jobs.services.labelling.agreement.merging import electorate, weight
from jobs.services.labelling.agreement.quality import SPAM, Figures, figures_of, lines
from jobs.services.labelling.exporting import export
from tests.unit.jobs.services.labelling.filled import filled
from tests.unit.jobs.services.labelling.test_exporting import judged, rows

ALWAYS = None  # gives a 5 to everything
NUM_ITEMS, SEEDS = 200, range(20)


def rated(person: int, item: int, rating: int | None, kind: str = "rate", flags: Sequence[str] = ()) -> Given:
    return Given(item, person, {"kind": kind, "rating": rating, "flags": list(flags)}, [0], 1.0, None)


def crowd(seed: int, noises: Sequence[float | None], kind: str = "rate", *, first: int = 0) -> list[Given]:
    """Ratings of shared texts by people whose noise has these standard deviations; that of the truth is 1.2."""
    draw = random.Random(seed)
    found = []
    for item in range(first, first + NUM_ITEMS):
        quality = draw.gauss(3, 1.2)
        for person, noise in enumerate(noises):
            rating = 5 if noise is ALWAYS else min(5, max(1, round(quality + draw.gauss(0, noise))))
            found.append(rated(person, item, rating, kind))
    return found


def figures(given: Sequence[Given]) -> list[Figures]:
    return figures_of(given, {each.person: str(each.person) for each in given})


def accused(seed: int, noises: Sequence[float | None], kind: str = "rate") -> list[int]:
    return [int(each.name) for each in figures(crowd(seed, noises, kind)) if (each.spam or 0.0) >= SPAM]


@pytest.mark.parametrize("kind", ["rate", "review"])
def test_somebody_who_always_gives_the_same_rating_is_found(kind: str) -> None:
    assert [accused(seed, (0.7, 0.7, ALWAYS), kind) for seed in SEEDS] == [[2]] * len(SEEDS)
    assert [accused(seed, (1.5, 1.5, 1.5, ALWAYS), kind) for seed in SEEDS] == [[3]] * len(SEEDS)


@pytest.mark.parametrize("noises", [(0.7, 0.7, 2.0), (0.7, 2.0, ALWAYS), (2.0, 2.0, 2.0), (0.7, ALWAYS), (0.7, 2.0)])
def test_an_honest_noisy_person_is_not_accused(noises: Sequence[float | None]) -> None:
    honest = {person for person, noise in enumerate(noises) if noise is not ALWAYS}
    assert [honest & set(accused(seed, noises)) for seed in SEEDS] == [set()] * len(SEEDS)


def test_many_people_who_share_few_texts_with_each_other_are_told_apart() -> None:
    draw = random.Random(0)
    noises = {person: draw.uniform(0.5, 2.0) for person in range(1, 12)} | {0: ALWAYS}
    shown = {item: set(draw.sample(range(12), 3)) for item in range(600)}
    for seed in range(5):
        given = [
            each
            for part in range(3)  # of 200 texts
            for each in crowd(10 * seed + part, [noises[person] for person in range(12)], first=part * NUM_ITEMS)
            if each.person in shown[each.item]
        ]
        assert [each.name for each in figures(given) if (each.spam or 0.0) >= SPAM] == ["0"]


def test_figures_that_do_not_exist_are_none() -> None:
    (alone,) = figures([rated(0, 0, 4), rated(0, 1, 2)])
    assert (alone.num, alone.ratings, alone.reviews, alone.spam, alone.reliability) == (2, None, None, None, None)
    same = figures(crowd(0, (0.7, ALWAYS)))[1]
    assert (same.ratings, same.spam) == (0.0, None)  # of two people nobody can say who is right


def test_correlations_by_hand() -> None:
    """Of 1 2 3 with 1 2 3 it is 1, of 1 2 3 with 1 3 2 it is 1/2."""
    given = [rated(person, item, rating) for person, row in enumerate([(1, 2, 3), (1, 2, 3), (1, 3, 2)])
             for item, rating in enumerate(row)]  # fmt: skip
    assert [each.ratings for each in figures(given)] == [pytest.approx(value) for value in (0.75, 0.75, 0.5)]
    # Each kind has its own mean: two people who agree in neither do not agree because reviews are higher.
    both = [rated(person, item + 2 * shift, rating + 2 * shift, kind)
            for shift, kind in enumerate(("rate", "review"))
            for person, row in enumerate([(1, 2), (2, 1)]) for item, rating in enumerate(row)]  # fmt: skip
    assert [each.ratings for each in figures(both)] == [pytest.approx(-1.0)] * 2


def test_reviews_are_compared_with_the_majority_of_the_others() -> None:
    verdicts = [(0, 0, 1), (1, 1, 1), (0, 1, 1), (0, 0, 0)]  # 1: rejects
    given = [
        rated(person, item, 3, "review", ["spam"] if rejects else ["rude"])
        for item, row in enumerate(verdicts)
        for person, rejects in enumerate(row)
    ]
    # The first one: against two on the third text; of the first text the others are divided.
    assert [each.reviews for each in figures(given)] == [pytest.approx(value) for value in (2 / 3, 1.0, 2 / 3)]


def test_reviews_have_an_alpha() -> None:
    given = [rated(person, item, rating, "review") for item, row in enumerate([(1, 1), (2, 2), (1, 2)])
             for person, rating in enumerate(row)]  # fmt: skip
    assert alphas(given)["review"].value == pytest.approx(4 / 9)


def test_the_mean_of_exported_scores_is_weighted(tmp_path: Path) -> None:
    store = filled(tmp_path, num=NUM_ITEMS, kind="rate", overlap=3, num_replies=1)
    given = crowd(0, (0.7, 0.7, ALWAYS))
    for person in range(3):
        judged(store, f"person-{person}", [each.answer for each in given if each.person == person])
    export(store, tmp_path / "scores.jsonl", "scores")
    judges = electorate(given)
    weights = [judges.rating_weight(person) for person in range(3)]
    assert weights[0] == weights[1] == weight(0.8) and weights[2] < 0.1 * weights[0]
    answers: list[dict[str, Any]] = [each.answer for each in given[:3]]
    wanted = sum(w * answer["rating"] for w, answer in zip(weights, answers, strict=True)) / sum(weights)
    assert rows(tmp_path / "scores.jsonl")[0]["score"] == pytest.approx(wanted, abs=1e-4)
    with store.reading() as connection:
        head, first, *_, last, alpha = lines(connection)
    assert head.split() == ["name", "judged", "seconds", "others", "gold", "right", "ratings", "reviews", "spam"]
    assert first.split()[3:6] == ["–"] * 3 and first.split()[7:] == ["–", "–"]
    assert float(last.split()[8]) >= SPAM and alpha.startswith("Krippendorff's alpha, rate")
