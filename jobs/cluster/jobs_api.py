"""One job on a Ray cluster, through Ray's Jobs API: submits it, follows its output, and returns its exit code.

connect(url) -> JobsClient       every request has a deadline
connect_local(ray) -> the same for a private local Ray: its token is sent to no other process
submit(client, job) -> id
follow(client, id, write) -> exit code of the job's process
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from jobs.cluster.listener import Listener, checked_client, checked_session
from jobs.cluster.local_ray import LocalRay
from orchestrator.errors import CapacityError, ConfigError

POLL_S = 1.0
REQUEST_S = 60.0
START_S = 180.0
SUBMIT_S = 30.0
LOST_S = 60.0
LAST_LINES_S = 10.0
# Ray kills a stopped job after 3 s: too early to save its state.
STOP_GRACE_S = 60

FAILED = 1

# Ray's client reports every upload and closed connection on standard error.
for _name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
    logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True)
class Job:
    """What is submitted.

    Args:
        entrypoint: shell command; with `exec` before the last program, a stop signals that program.
        working_dir: folder to send to the cluster, in which the command runs; None: no folder.
        environment: variables for the command and all its actors.
        resources: resources of the node that runs the command, e.g. {"coordinator": 1}.
    """

    entrypoint: str
    working_dir: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)


class JobsClient(JobSubmissionClient):  # type: ignore[misc]  # ray's class is untyped
    """Ray's client with a deadline for each request; by default requests wait forever.

    Args:
        listener: the process that must serve `address`; no data, in particular no token, is sent to another one.
            None: a server on the network, which the user trusts.
    """

    def __init__(
        self, address: str, *, request_s: float, headers: Mapping[str, str], listener: Listener | None
    ) -> None:
        self.request_s = request_s
        self._listener = listener
        self._session = checked_session(listener) if listener else requests.Session()
        super().__init__(address, headers=dict(headers))

    def _do_request(
        self, method: str, endpoint: str, *, data: bytes | None = None, json_data: Any = None, **kwargs: Any
    ) -> requests.Response:
        answer = self._session.request(
            method,
            self._address + endpoint,
            data=data,
            json=json_data,
            headers=self._headers,
            verify=self._verify,
            **{"timeout": self.request_s, **kwargs},
        )
        if answer.status_code in (401, 403):
            raise AuthenticationError(answer.text)
        return answer

    def require_server(self) -> None:
        """Raises CapacityError if the process that must serve the address has ended."""
        if self._listener is not None:
            self._listener.require()

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        if self._listener is None:
            async for chunk in super().tail_job_logs(job_id):
                yield chunk
            return
        async with (
            checked_client(self._listener) as client,
            client.ws_connect(f"{self._address}/api/jobs/{job_id}/logs/tail", headers=self._headers) as socket,
        ):
            async for message in socket:
                yield message.data
            if socket.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
                raise RuntimeError(f"the connection to the lines of job {job_id} broke")


def connect(
    address: str, *, token: str | None = None, listener: Listener | None = None, wait_s: float = 10.0
) -> JobsClient:
    """The Jobs API at `address` (http://host:port).

    Args:
        address: URL of the cluster's dashboard.
        token: the cluster's token; None: from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, if any.
        listener: this program's process that must serve `address`.
        wait_s: time limit of the first answer.

    Raises:
        CapacityError: no Jobs API answers there.
        ConfigError: not a URL, or the token is missing or wrong.
    """
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address!r} is not the URL of a Ray dashboard; give e.g. http://10.0.0.1:8265.")
    # In Ray's client RAY_ADDRESS and RAY_API_SERVER_ADDRESS override the given address.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        client = JobsClient(address, request_s=wait_s, headers=headers, listener=listener)
    except AuthenticationError as error:
        raise ConfigError(
            f"the cluster at {address} refuses this token ({_first_line(error)}). Set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to the file with the cluster's token."
        ) from None
    except (ConnectionError, requests.RequestException, RuntimeError, ValueError, KeyError) as error:
        raise CapacityError(
            f"no Ray Jobs API answers at {address} within {wait_s:.0f} s ({_first_line(error)}). "
            + (
                _about_proxy(address)
                or "Check host and port of the dashboard, or start a cluster with `ray start --head`."
            )
        ) from None
    client.request_s = REQUEST_S
    return client


def connect_local(ray: LocalRay) -> JobsClient:
    """The Jobs API of a private local Ray."""
    return connect(ray.url, token=ray.token, listener=ray.listener)


def _about_proxy(address: str) -> str | None:
    """The proxy for requests to `address` according to the environment, and how to avoid it."""
    host = urlsplit(address).hostname or ""
    for scheme, proxy in requests.utils.get_environ_proxies(address).items():
        if scheme in (urlsplit(address).scheme, "all"):
            shown = urlsplit(proxy)
            return (
                f"The request went through the proxy {shown.hostname}:{shown.port} of the environment "
                f"({scheme}_proxy); where {host} is reached without one, set NO_PROXY={host}."
            )
    return None


def submit(client: JobsClient, job: Job) -> str:
    """Submits the job; returns its submission id.

    A server that is starting answers with a 5xx or drops the connection. The job's id is chosen here, so that a retry
    can't start it twice.

    Raises:
        CapacityError: the cluster does not accept it within SUBMIT_S.
    """
    job_id = f"rlhf-{secrets.token_hex(8)}"
    environment = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S), **job.environment}
    runtime_env: dict[str, Any] = {"env_vars": environment}
    if job.working_dir:
        runtime_env["working_dir"] = str(job.working_dir)
    until = monotonic() + SUBMIT_S
    while True:
        try:
            return str(
                client.submit_job(
                    entrypoint=job.entrypoint,
                    submission_id=job_id,
                    runtime_env=runtime_env,
                    entrypoint_resources=dict(job.resources) or None,
                )
            )
        except (RuntimeError, requests.RequestException, ValueError) as error:
            if _is_there(client, job_id):
                return job_id
            if not _may_pass(error) or monotonic() > until:
                raise CapacityError(
                    f"the cluster at {client.get_address()} did not take the job: {_first_line(error)}. Look at its "
                    "dashboard."
                ) from None
        sleep(POLL_S)


def _is_there(client: JobsClient, job_id: str) -> bool:
    with contextlib.suppress(RuntimeError, requests.RequestException):
        client.get_job_info(job_id)
        return True
    return False


def _may_pass(error: Exception) -> bool:
    """Whether a retry may succeed: after a lost connection or a server error (Ray reports the status as text)."""
    is_lost = isinstance(error, (requests.ConnectionError, requests.Timeout))
    return is_lost or re.search(r"status code 5\d\d", str(error)) is not None


async def follow(client: JobsClient, job_id: str, write: Callable[[str], None]) -> int:
    """Writes the job's output as it arrives and returns its exit code. When cancelled, it stops the job first.

    Raises:
        CapacityError: the job does not start within START_S, or the cluster stops answering for LOST_S.
    """
    lines = asyncio.create_task(_tail(client, job_id, write))
    try:
        details = await _ended(client, job_id, started_by=monotonic() + START_S)
        await asyncio.wait({lines}, timeout=LAST_LINES_S)
        return _exit_code(details, write)
    except asyncio.CancelledError:
        await _stop(client, job_id, write)
        await asyncio.wait({lines}, timeout=LAST_LINES_S)
        raise
    finally:
        lines.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await lines


async def _ended(client: JobsClient, job_id: str, *, started_by: float = float("inf")) -> JobDetails:
    answered = monotonic()
    while True:
        try:
            details = await asyncio.to_thread(client.get_job_info, job_id)
        except (RuntimeError, requests.RequestException) as error:
            client.require_server()
            if monotonic() - answered > LOST_S:
                raise CapacityError(
                    f"the cluster at {client.get_address()} has not answered for {LOST_S:.0f} s while job {job_id} ran "
                    f"({_first_line(error)}). The job may still run; look for it with `ray job list`."
                ) from None
        else:
            answered = monotonic()
            if details.status.is_terminal():
                return details
            if details.status == JobStatus.PENDING and answered > started_by:
                raise CapacityError(
                    f"job {job_id} has not started within {START_S:.0f} s: {details.message} "
                    "No node offers what its entry point needs; see `ray status`, and --resource."
                )
        await asyncio.sleep(POLL_S)


async def _tail(client: JobsClient, job_id: str, write: Callable[[str], None]) -> None:
    """Writes the log to its end. Reconnects after a broken connection, and skips written parts."""
    written = 0
    while True:
        position = 0
        with contextlib.suppress(RuntimeError, aiohttp.ClientError, OSError, CapacityError):
            async for chunk in client.tail_job_logs(job_id):
                fresh = chunk[max(0, written - position) :]
                position += len(chunk)
                written += len(fresh)
                if fresh:
                    write(fresh)
            return
        await asyncio.sleep(POLL_S)


async def _stop(client: JobsClient, job_id: str, write: Callable[[str], None]) -> None:
    write(f"stopping job {job_id}: it has {STOP_GRACE_S} s to commit what it holds\n")
    with contextlib.suppress(RuntimeError, requests.RequestException, TimeoutError, CapacityError):
        await asyncio.to_thread(client.stop_job, job_id)
        await asyncio.wait_for(_ended(client, job_id), STOP_GRACE_S + 2 * LAST_LINES_S)


def _exit_code(details: JobDetails, write: Callable[[str], None]) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return 0
    code = details.driver_exit_code
    if not code:
        write(f"job {details.submission_id} {details.status}: {details.message}\n")
        return FAILED
    # Ended by a signal: reported as in a shell.
    return int(code) if code > 0 else 128 - int(code)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
