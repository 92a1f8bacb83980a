"""`python -m tests.chaos.people`: people in the loop, unattended, on the embedded model.

Two rounds of sample, people, reward model, RL and evaluation. The people are simulated (the gold score with noise) and
judge over the service's HTTP interface. One run is left alone; another one is killed while it waits in the first round,
and while people answer in the last one. Both must end with the same policy. Prints what was seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml

from jobs.command import say
from jobs.services.labelling.store import Store
from jobs.services.labelling.waiting import batches
from jobs.why.explain import explain
from jobs.why.reader import read_facts
from orchestrator.run.storage import read_json, sha256
from tests.integration.pipelines import ROOT
from tests.integration.test_people import held
from tests.people import labellers, until
from tests.unit.jobs.services.labelling.running import free_port

NAMES = ("ann", "bob")
LONG_S = 7200.0
WATCHED_S = 10.0


def config_of(folder: Path, given: argparse.Namespace) -> Path:
    tree = yaml.safe_load((ROOT / "jobs/configs/people.yaml").read_text(encoding="utf-8"))
    tree["stages"][0]["rounds"] = given.rounds
    tree |= {
        "people": {"overlap": len(NAMES), "overlap_share": 1.0},
        "run": {"root": str(folder)},
        "telemetry": {"prometheus_port": 0, "tensorboard": False},
    }
    tree["sample"]["prompts"] = given.prompts
    tree["rl"]["steps"] = given.steps
    tree["evaluation"]["prompts"] = given.held_out
    path = folder / "people.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


class Loop:
    """One run, and the people who judge for it."""

    def __init__(self, folder: Path, config: Path, cluster: str, name: str) -> None:
        self.run, self.log = folder / name, folder / f"{name}.log"
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        keys = [f"run.id={name}", f"people.address=127.0.0.1:{port}"]
        self._command = [sys.executable, "-m", "jobs", "run", "--config", str(config), *keys]
        self._environment = {**os.environ, "RAY_ADDRESS": cluster}
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        say(f"{self.run.name}: killed")
        self._start()

    def reach(self, made: str) -> None:
        until(lambda: (self.run / made).exists() or self.process.poll() is not None, within_s=LONG_S, what=made)
        assert (self.run / made).exists(), self.log.read_text(encoding="utf-8")

    def num_judged(self, stage: str) -> int:
        store = Store(str(self.run / "labels.db"))
        with store.reading() as connection:
            found = batches.progress(connection, f"{self.run.name}/{stage}")
        store.close()
        return found.num_judgements if found else 0

    def judged(self, stage: str, *, kills: bool) -> None:
        """Lets people judge what a stage asks for."""
        with labellers(self.run / "labels.db", self.address, NAMES, pause_s=0.05) as people:
            if kills:
                until(lambda: self.num_judged(stage) >= 10, within_s=LONG_S, what="judgements")
                self.kill()
                say(f"{self.run.name}: that was after {self.num_judged(stage)} judgements of {stage}")
            self.reach(f"stages/{stage}/people.jsonl")
        say(f"{self.run.name}: {stage}: requests without an answer: {[each.failures for each in people]}")

    def finish(self) -> None:
        assert self.process.wait(LONG_S) == 0, self.log.read_text(encoding="utf-8")


def looked_at(loop: Loop) -> None:
    """What Ray, `why`, the endpoint and the processor say while the run waits."""
    until(lambda: not held(), within_s=60.0, what="the end of all actors")
    say(f"while it waits: {held()} of the cluster is held by actors or placement groups")
    process = psutil.Process(loop.process.pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(WATCHED_S)
    say(f"while it waits: the driver used {sum(process.cpu_times()[:2]) - before:.2f} CPU seconds in {WATCHED_S:.0f} s")
    facts = read_facts(loop.run, time.time())
    assert facts is not None
    explained = explain(facts)
    assert explained.state == "waiting", explained
    say("\n".join(["why says:", *(f"  {line}" for line in explained.now)]))


def results(run: Path, rounds: int) -> list[Any]:
    """Of each round: what it measured, and digests of what it learned."""
    found = []
    for number in range(1, rounds + 1):
        place = run / "stages"
        trained = read_json(place / f"reward_model-{number}" / "reward_model.json")
        metrics = read_json(place / f"evaluate-{number}" / "evaluate" / "result.json")["metrics"]
        rankings = (place / f"people-{number}" / "people.jsonl").read_text(encoding="utf-8").splitlines()
        found.append(
            {
                "rankings": len(rankings),
                "people": [{**json.loads(row), "source": None} for row in rankings],
                "accuracy": trained["held_out_accuracy"],
                "interval": trained["interval"],
                "pairs": trained["num_pairs"],
                "gold": {name: value for name, value in metrics.items() if name.startswith("gold")},
                "reward model": sha256(place / f"reward_model-{number}" / "reward-model" / "model.safetensors"),
                "policy": sha256(place / f"rl-{number}" / "export" / "model.safetensors"),
            }
        )
    return found


def tell(name: str, found: Sequence[Any]) -> None:
    for number, each in enumerate(found, 1):
        gold, (low, high) = each["gold"], each["interval"]
        say(
            f"{name}, round {number}: {each['rankings']} rankings; reward model {each['accuracy']:.1%} of "
            f"{each['pairs']} held-out pairs of people (95 %: {low:.1%} to {high:.1%}); gold of held-out prompts "
            f"{gold['gold_against']:.3f} -> {gold['gold']:.3f}, difference {gold['gold_delta']:+.3f} "
            f"({gold['gold_delta_low']:+.3f} to {gold['gold_delta_high']:+.3f}); policy {each['policy'][:12]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=96, help="prompts that people judge in a round")
    parser.add_argument("--steps", type=int, default=6, help="steps of RL in a round")
    parser.add_argument("--held-out", type=int, default=96, help="prompts of an evaluation")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="people-"))
    temporary = Path("/tmp") / f"pl{os.getpid()}"
    ray.init(num_cpus=2, _temp_dir=str(temporary), log_to_driver=False, object_store_memory=500_000_000)
    try:
        cluster = ray.get_runtime_context().gcs_address
        config = config_of(folder, given)
        outcomes = []
        for name in ("whole", "killed"):
            loop, started = Loop(folder, config, cluster, name), time.monotonic()
            for number in range(1, given.rounds + 1):
                loop.reach(f"stages/people-{number}/people.json")
                if number == 1:
                    looked_at(loop)
                    if name == "killed":
                        loop.kill()
                loop.judged(f"people-{number}", kills=name == "killed" and number == given.rounds)
            loop.finish()
            outcomes.append(results(loop.run, given.rounds))
            tell(name, outcomes[-1])
            say(f"{name}: {time.monotonic() - started:.0f} s")
        assert outcomes[0] == outcomes[1], "the killed run ended otherwise"
        say("both runs ended with the same rankings, reward models, policies and measurements, bit by bit")
    finally:
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # after an error it stays


if __name__ == "__main__":
    main()
