"""`python -m benchmarks.active [--seeds N] [--labels NAME] [--data FILE]`: what a reward model learns from items that
were chosen, and from as many that were drawn at random.

The pairs are those of a preference file (hh-rlhf-harmless). The features are the states of SmolLM2-135M at the last
token of each reply, frozen. The reward model is an ensemble of linear heads on them: hundreds of rounds take minutes.
Every seed splits the pairs into a pool and held-out ones. All contenders start from the same labels, and before each
round of labels train again on all that they have. Differences are paired by seed; their intervals are Student's.

Labels are those of the people who judged the pairs (`people`), or of a rule without noise (`rule`: positivity, VADER),
or planted: a linear function of the features, with Bradley-Terry noise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from scipy.optimize import minimize
from scipy.special import expit

from actors.models.model import EMBEDDED, load_scorer, resolve_model
from actors.rewards.gold import vader_positivity
from actors.rewards.model import RewardModel
from actors.text.conversations import Chat, Transcript, load_chat
from benchmarks.harness import Figure, interval, plain_figure
from benchmarks.table import report
from benchmarks.work import ROOT
from jobs.command import say
from orchestrator.config.sections import RunConfig
from orchestrator.data.kinds import RANKINGS
from orchestrator.data.readers import read_all
from orchestrator.prompts import derive_seed
from orchestrator.training.acquisition import Numbers, Signals, choose, components, information
from orchestrator.training.ensemble import bootstrap_weights

DATA = ROOT.parent / "shared" / "data" / "hh-rlhf-harmless.jsonl.gz"
HEADS = 5
START, BATCH, LAST = 40, 40, 240  # labels
LONGEST = 160  # tokens of a conversation with its reply
LAYERS = 5  # of the trunk, as in the quickstart
DECAY = 0.01  # the best of 0.01 to 1 for random labels, on seeds 100 to 102
_PRECISION = {"maxiter": 1000, "gtol": 1e-6, "ftol": 1e-12}
_AT_ONCE = 128
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Contender:
    """How items are chosen: weight of novelty; whether information counts; share at random."""

    diversity: float = 1.0
    informed: bool = True
    control_share: float = 0.0


RANDOM = "random"
CONTENDERS: Mapping[str, Contender] = {
    RANDOM: Contender(control_share=1.0),
    "disagreement": Contender(diversity=0.0),
    "novelty": Contender(informed=False),
    "both": Contender(),
    "both, half at random": Contender(control_share=0.5),
}


@dataclass(frozen=True, eq=False)
class Pairs:
    """Features of the better and of the worse reply of each pair."""

    better_PD: Numbers
    worse_PD: Numbers

    @property
    def differences(self) -> Numbers:
        """Better less worse, (P, D)."""
        return self.better_PD - self.worse_PD


@dataclass(frozen=True, eq=False)
class Data:
    """A preference file: the texts of the replies of each pair, and their features, (P, 2, D). Better replies are
    first."""

    texts: Sequence[tuple[str, str]]
    features_P2D: Numbers

    def ordered(self, scores_P2: Numbers) -> Pairs:
        """By scores instead; without pairs that are equally good."""
        rows = np.flatnonzero(scores_P2[:, 0] != scores_P2[:, 1])
        better = scores_P2[rows].argmax(-1)
        return Pairs(self.features_P2D[rows, better], self.features_P2D[rows, 1 - better])


def main(
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 20,
    first: Annotated[int, typer.Option(help="The first one.")] = 0,
    labels: Annotated[list[str] | None, typer.Option(help="people, rule or planted; default: all.")] = None,
    data: Annotated[Path, typer.Option(help="Preference file.")] = DATA,
    cache: Annotated[Path | None, typer.Option(help="File that keeps the features.")] = None,
) -> None:
    """Measures, writes benchmarks/results/active.json and shows the table."""
    found = read(data, cache)
    figures: list[Figure] = []
    for name in labels or LABELS:
        curves = [curves_of(LABELS[name](found, seed), seed) for seed in range(first, first + seeds)]
        figures += figures_of(name, curves)
        say("\n".join(f"{figure.name}: {figure.detail}" for figure in figures if figure.name.startswith(name)))
    report("active", figures)


def read(path: Path, cache: Path | None) -> Data:
    """The pairs of at most LONGEST tokens. Raises DataError."""
    if cache is not None and cache.exists():
        with np.load(cache) as kept:
            return Data(list(map(tuple, kept["texts"].tolist())), kept["features"])
    records, _ = read_all(RANKINGS, path)
    base = resolve_model(EMBEDDED, RunConfig().cache)
    chat = load_chat(base)
    asked = [(record.messages, (record.replies[0], record.replies[-1]), record.tools) for record in records]
    transcripts = chat.replies(asked)
    rows = [row for row, pair in enumerate(transcripts) if max(map(len, pair)) <= LONGEST]
    features = states(base, chat, [transcript for row in rows for transcript in transcripts[row]])
    found = Data([(str(asked[row][1][0]), str(asked[row][1][1])) for row in rows], features)
    if cache is not None:
        np.savez(cache, texts=np.array(found.texts), features=features)
    return found


def states(base: Path, chat: Chat, transcripts: Sequence[Transcript]) -> Numbers:
    """Of the trunk of an untrained reward model, (P, 2, D), of length 1 on average: so the decay means the same for all
    models."""
    with tempfile.TemporaryDirectory(prefix="active-", dir="/tmp") as folder:
        load_scorer(base, torch.float32, new_head="zero", layers=LAYERS).save_pretrained(folder)
        chat.tokenizer.save_pretrained(folder)
        model = RewardModel(
            Path(folder),
            chat,
            dtype=torch.float32,
            device=torch.device("cpu"),
            micro_batch_tokens=2048,
            normalise=False,
        )
    found = []
    for start in range(0, len(transcripts), _AT_ONCE):
        found.append(model.head_states(transcripts[start : start + _AT_ONCE])[1])
        say(f"features of {min(start + _AT_ONCE, len(transcripts))} of {len(transcripts)} replies")
    features: Numbers = np.concatenate(found).reshape(len(transcripts) // 2, 2, -1)
    features /= np.sqrt(np.square(features).sum(-1).mean())
    return features


def _people(data: Data, seed: int) -> Pairs:
    return data.ordered(np.tile([1.0, 0.0], (len(data.texts), 1)))


def _rule(data: Data, seed: int) -> Pairs:
    return data.ordered(np.array([[vader_positivity("", text, {}) for text in pair] for pair in data.texts]))


def _planted(data: Data, seed: int) -> Pairs:
    """The chance of the better reply is that of Bradley and Terry; their scores differ by 2, as standard deviation."""
    generator = np.random.default_rng((seed, 1))
    scores_P2 = data.features_P2D @ generator.normal(size=data.features_P2D.shape[-1])
    scores_P2 *= 2.0 / np.std(scores_P2[:, 0] - scores_P2[:, 1])
    return data.ordered(scores_P2 + generator.gumbel(size=scores_P2.shape))


LABELS: Mapping[str, Callable[[Data, int], Pairs]] = {"people": _people, "rule": _rule, "planted": _planted}


def curves_of(pairs: Pairs, seed: int) -> dict[str, list[float]]:
    """For each contender the accuracy on held-out pairs (a third) by number of labels: START, START + BATCH, ..."""
    order = np.random.default_rng(seed).permutation(len(pairs.better_PD))
    held_out, pool = np.split(order, [len(order) // 3])
    tested, rest = (Pairs(pairs.better_PD[rows], pairs.worse_PD[rows]) for rows in (held_out, pool))
    points = components(0.5 * (rest.better_PD + rest.worse_PD))
    return {name: _curve(one, rest, points, tested, seed) for name, one in CONTENDERS.items()}


def _curve(contender: Contender, pool: Pairs, points_PD: Numbers, tested: Pairs, seed: int) -> list[float]:
    labelled = np.arange(START)
    accuracies = []
    while True:
        heads_DH = trained(pool.differences[labelled], labelled, seed)
        accuracies.append(accuracy(heads_DH, tested))
        if len(labelled) + BATCH > LAST:
            return accuracies
        left = np.setdiff1d(np.arange(len(points_PD)), labelled)
        scores = np.stack([pool.better_PD[left] @ heads_DH, pool.worse_PD[left] @ heads_DH], axis=1)
        told = [information(each) if contender.informed else 0.0 for each in scores]
        chosen = choose(
            len(left),
            Signals(np.array(told), points_PD[left], points_PD[labelled]),
            budget=BATCH,
            control_share=contender.control_share,
            seed=derive_seed(seed, len(labelled)),
            diversity=contender.diversity,
        )
        labelled = np.concatenate([labelled, left[[choice.index for choice in chosen]]])


def trained(differences_ND: Numbers, numbers: Ints, seed: int) -> Numbers:
    """Heads (D, H), of which each has its own start and its own weights of the pairs, as in training
    (orchestrator/training/ensemble.py)."""
    weights_NH = bootstrap_weights([f"pair {number}" for number in numbers], HEADS, seed)
    generator = np.random.default_rng((seed, 2))
    starts_DH = generator.normal(0.0, DECAY**-0.5, (differences_ND.shape[1], HEADS))
    return np.stack(
        [fitted(differences_ND, *of_head, DECAY) for of_head in zip(weights_NH.T, starts_DH.T, strict=True)], 1
    )


def fitted(differences_ND: Numbers, weights_N: Numbers, start_D: Numbers, decay: float) -> Numbers:
    """The minimum over w of Σ weight · -log σ(difference · w) + decay/2 · |w - start|²."""

    def loss(head_D: Numbers) -> tuple[float, Numbers]:
        margins_N, moved_D = differences_ND @ head_D, head_D - start_D
        value = weights_N @ np.logaddexp(0.0, -margins_N) + 0.5 * decay * moved_D @ moved_D
        return float(value), decay * moved_D - differences_ND.T @ (weights_N * expit(-margins_N))

    found: Numbers = minimize(loss, start_D, jac=True, method="L-BFGS-B", options=_PRECISION).x
    return found


def accuracy(heads_DH: Numbers, pairs: Pairs) -> float:
    """Share of pairs that the mean of the heads has in the right order."""
    return float((pairs.differences @ heads_DH.mean(-1) > 0.0).mean())


def figures_of(labels: str, curves: Sequence[Mapping[str, Sequence[float]]]) -> list[Figure]:
    """The accuracy of each contender, and less that of RANDOM, at SHOWN numbers of labels and as the mean over all."""
    return [
        _figure(
            f"{labels}: {name}, {what}",
            [mean(curve[name]) for curve in curves],
            [mean(curve[RANDOM]) for curve in curves],
        )
        for what, mean in MEANS.items()
        for name in CONTENDERS
    ]


def _figure(name: str, accuracies: Sequence[float], drawn: Sequence[float]) -> Figure:
    gains = [100.0 * (ours - theirs) for ours, theirs in zip(accuracies, drawn, strict=True)]
    detail = f"mean {interval(accuracies)}; less random, in points {interval(gains)}"
    return plain_figure(name, accuracies, "accuracy", detail=detail)


def _at(labels: int, curve: Sequence[float]) -> float:
    return curve[(labels - START) // BATCH]


MEANS: Mapping[str, Callable[[Sequence[float]], float]] = {
    **{f"{labels} labels": partial(_at, labels) for labels in (80, 160, 240)},
    f"mean of {START} to {LAST}": fmean,
}


if __name__ == "__main__":
    typer.run(main)
