"""The web application: the page, the API of labellers, health and metrics. A route is one transaction, in a thread."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Row, select
from starlette.types import ASGIApp

from jobs.services.labelling import work
from jobs.services.labelling.admin.routes import admin_routes
from jobs.services.labelling.answers import FLAGS, Id, Judgement
from jobs.services.labelling.people import Person, person_of, valid_hashes
from jobs.services.labelling.refusals import Refused
from jobs.services.labelling.store import Store, StoreFull
from jobs.services.labelling.tables import ADMIN, about
from jobs.services.labelling.web.guard import Guard, Links, token_of
from jobs.services.labelling.web.meters import Meters
from orchestrator.errors import StorageError

_PAGE = Path(__file__).parents[1] / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Settings:
    """Args:
    guidelines: text beside every task.
    rate: requests per second of one labeller, on average.
    open_metrics: whether /metrics needs no token.
    """

    rules: work.Rules = field(default_factory=work.Rules)
    guidelines: str = ""
    rate: float = 20.0
    open_metrics: bool = True


class ShowingOf(BaseModel):
    """The body of requests about a task."""

    model_config = ConfigDict(extra="forbid")

    showing: Id


def identify(request: Request, authorization: Annotated[str, Header()] = "") -> Person:
    """The owner of the request's token. Raises HTTPException 401."""
    token = token_of(authorization)
    store: Store = request.app.state.store
    person = None
    if token:
        with store.reading() as connection:
            person = person_of(connection, token)
    if person is None:
        raise HTTPException(401, "this link is not valid, or no longer; ask for a new one.")
    return person


Who = Annotated[Person, Depends(identify)]


def create_app(store: Store, settings: Settings) -> ASGIApp:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.store = store
    meters = Meters(store)
    _handle_errors(app)
    app.include_router(_pages())
    app.include_router(_health(store, settings, meters))
    app.include_router(_labelling(store, settings), prefix="/api")
    app.include_router(admin_routes(store, identify), prefix="/api/admin")

    def hashes() -> Collection[str]:
        with store.reading() as connection:
            return valid_hashes(connection)

    # Around the whole application, and no middleware of it: answers to unexpected errors are made outside of those.
    return Guard(app, Links(hashes), meters, rate=settings.rate)


def _handle_errors(app: FastAPI) -> None:
    answers: Mapping[type[Exception], int] = {
        StoreFull: 507,
        StorageError: 503,
    }

    def answer(status: int, request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status)

    for kind, status in answers.items():
        app.add_exception_handler(kind, partial(answer, status))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"detail": str(error), "code": error.code}, error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        """Without the values: they may hold what can't be encoded."""
        faults = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()[:5])
        return JSONResponse({"detail": ascii(faults)[1:-1], "code": "invalid"}, 422)


def _pages() -> APIRouter:
    """Files of the page, read once. Other names do not exist, so that no path leads elsewhere."""
    router = APIRouter()
    files = {path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in _PAGE.iterdir() if path.suffix in _TYPES}

    @router.get("/")
    async def page() -> Response:
        return static("index.html")

    @router.get("/static/{name}")
    async def static_file(name: str) -> Response:
        return static(name)

    def static(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "no such file.")
        content, kind = files[name]
        return Response(content, media_type=f"{kind}; charset=utf-8")

    return router


def _health(store: Store, settings: Settings, meters: Meters) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz")
    def health() -> Mapping[str, str]:
        store.require_claim()
        with store.reading() as connection:
            connection.execute(select(about.c.version)).one()
        return {"status": "ok"}

    @router.get("/metrics")
    def metrics(request: Request, authorization: Annotated[str, Header()] = "") -> Response:
        if not settings.open_metrics and identify(request, authorization).role != ADMIN:
            raise HTTPException(403, "metrics are for the admin.")
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _labelling(store: Store, settings: Settings) -> APIRouter:
    router = APIRouter()
    rules = settings.rules

    @router.get("/me")
    def me(person: Who) -> Mapping[str, Any]:
        with store.reading() as connection:
            progress = work.progress(connection, person)
        return {
            "name": person.name,
            "role": person.role,
            "paused": person.paused,
            "guidelines": settings.guidelines,
            "flags": FLAGS,
            "lease_s": rules.lease_s,
            **progress,
        }

    @router.post("/next")
    def next_task(person: Who) -> Mapping[str, Any]:
        with store.writing() as connection:
            found = work.next_task(connection, person, rules)
        return {"task": None if found is None else _task(found), "paused": person.paused}

    @router.post("/judgements")
    def judge(judgement: Judgement, person: Who) -> Mapping[str, Any]:
        with store.writing() as connection:
            is_new = work.judge(connection, person, judgement, num_reviews=rules.num_reviews)
        return {"id": judgement.id, "new": is_new}

    @router.post("/skip")
    def skip(body: ShowingOf, person: Who) -> Mapping[str, Any]:
        with store.writing() as connection:
            work.skip(connection, person, body.showing)
        return {}

    @router.post("/keep")
    def keep(body: ShowingOf, person: Who) -> Mapping[str, Any]:
        with store.writing() as connection:
            work.keep(connection, person, body.showing, rules)
        return {}

    @router.post("/undo")
    def undo(body: ShowingOf, person: Who) -> Mapping[str, Any]:
        with store.writing() as connection:
            work.undo(connection, person, body.showing, rules)
        return {}

    return router


def _task(showing: Row[Any]) -> Mapping[str, Any]:
    """What the page gets of a showing: the replies in the order of the places, and nothing of where they come from."""
    return {
        "showing": showing.id,
        "kind": showing.kind,
        "messages": [_shown(message) for message in showing.messages],
        "replies": [_shown(showing.replies[index]["reply"])["content"] for index in showing.order],
    }


def _shown(message: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """A message as role and text; calls of tools are lines of the text."""
    if isinstance(message, str):
        return {"role": "assistant", "content": message}
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in message.get("tool_calls", ())]
    return {"role": message["role"], "content": "\n".join([message["content"], *calls]).strip()}
