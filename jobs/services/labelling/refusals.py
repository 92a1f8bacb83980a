"""Why the service refuses a request: a code, which the page puts into words (page/texts.js), and words for programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from orchestrator.errors import ConfigError, DataError

Code = Literal[
    "answered",
    "invalid",
    "name",
    "no_batch",
    "no_export",
    "not_admin",
    "not_json",
    "not_last",
    "not_yours",
    "other_answer",
    "other_page",
    "too_long",
    "too_many",
    "unfit",
]
CODES: tuple[Code, ...] = get_args(Code)


class Refused(Exception):
    """The request can't be carried out; a repetition can't either."""

    status = 409

    def __init__(self, code: Code, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class Unknown(Refused):
    """No such task was shown to this person."""

    status = 404


class Unfit(Refused):
    """The answer does not fit its task, or what the admin wants does not fit the store."""

    status = 422


@contextmanager
def refusing(code: Code) -> Iterator[None]:
    """Errors of data and settings in the body become refusals with this code."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise Unfit(code, str(error)) from error
