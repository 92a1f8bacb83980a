"""A job is submitted once, even to a server that is not ready yet."""

from __future__ import annotations

from typing import Any

import pytest
import requests

import jobs.cluster.jobs_api
from jobs.cluster.jobs_api import Job, submit
from jobs.cluster.submit import run_of
from orchestrator.errors import CapacityError


class Server:
    """Replaces Ray's client: raises `failures` in order; with `keeps` it accepts the job nevertheless."""

    def __init__(self, *failures: Exception, keeps: bool = False) -> None:
        self.failures, self.keeps = list(failures), keeps
        self.tries: list[str] = []
        self.jobs: set[str] = set()

    def submit_job(self, *, submission_id: str, **rest: Any) -> str:
        self.tries.append(submission_id)
        failure = self.failures.pop(0) if self.failures else None
        if failure is None or self.keeps:
            assert submission_id not in self.jobs
            self.jobs.add(submission_id)
        if failure is not None:
            raise failure
        return submission_id

    def get_job_info(self, job_id: str) -> None:
        if job_id not in self.jobs:
            raise RuntimeError("Request failed with status code 404: no such job.")

    def get_address(self) -> str:
        return "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.cluster.jobs_api, "sleep", lambda seconds: None)


STARTING = RuntimeError("Request failed with status code 500: No available agent to submit job.")


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize(
    "failure", [STARTING, requests.ConnectionError("reset"), requests.Timeout("slow")], ids=["500", "reset", "slow"]
)
def test_a_server_that_is_not_ready_is_asked_again_and_the_job_starts_once(failure: Exception, keeps: bool) -> None:
    server = Server(failure, keeps=keeps)
    job_id = submit(server, Job("true"))  # type: ignore[arg-type]
    assert server.jobs == {job_id}
    assert len(server.tries) == (1 if keeps else 2)


def test_what_would_fail_again_is_not_tried_again() -> None:
    server = Server(RuntimeError("Request failed with status code 400: bad request"))
    with pytest.raises(CapacityError, match="status code 400"):
        submit(server, Job("true"))  # type: ignore[arg-type]
    assert len(server.tries) == 1


def test_tries_end(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr(jobs.cluster.jobs_api, "monotonic", lambda: next(times))
    server = Server(*[STARTING] * 50)
    with pytest.raises(CapacityError, match="No available agent"):
        submit(server, Job("true"))  # type: ignore[arg-type]
    assert len(server.tries) == 4


def test_what_to_run_again_is_sent_with_the_command() -> None:
    again = run_of(["run.id=a b"], begin="rl", only=None)
    assert again == "python -m jobs run --config submitted.yaml --from rl 'run.id=a b'"
    assert run_of([], begin=None, only="rl") == "python -m jobs run --config submitted.yaml --only rl"
