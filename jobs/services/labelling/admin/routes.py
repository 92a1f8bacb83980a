"""The API of the admin's page. Everything needs the admin's link."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict
from starlette.background import BackgroundTask

from jobs.services.labelling import people
from jobs.services.labelling.admin.overview import overview
from jobs.services.labelling.exporting import export
from jobs.services.labelling.people import Person
from jobs.services.labelling.refusals import Refused, refusing
from jobs.services.labelling.shapes.table import SHAPES
from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import ADMIN
from jobs.services.labelling.waiting import batches


class NotAdmin(Refused):
    status = 403


class NameOf(BaseModel):
    """The body of requests about a person."""

    model_config = ConfigDict(extra="forbid")

    name: str


class PauseOf(NameOf):
    paused: bool


class BatchOf(BaseModel):
    """The body of a request about a batch."""

    model_config = ConfigDict(extra="forbid")

    batch: str
    finished: bool


def admin_routes(store: Store, identify: Callable[[Request, str], Person]) -> APIRouter:
    """Args:
    identify: the owner of a request's token, from its header `Authorization`.
    """

    def only_admin(request: Request, authorization: Annotated[str, Header()] = "") -> None:
        if identify(request, authorization).role != ADMIN:
            raise NotAdmin("not_admin", "this is for the admin; rlhf label invite admin makes a link.")

    router = APIRouter(dependencies=[Depends(only_admin)])

    @router.get("/overview")
    def seen() -> Mapping[str, Any]:
        with store.reading() as connection:
            return overview(connection)

    @router.post("/invite")
    def invite(body: NameOf) -> Mapping[str, str]:
        with refusing("name"), store.writing() as connection:
            return {"token": people.invite(connection, body.name)}

    @router.post("/revoke")
    def revoke(body: NameOf) -> Mapping[str, Any]:
        with refusing("name"), store.writing() as connection:
            people.revoke(connection, body.name)
        return {}

    @router.post("/pause")
    def pause(body: PauseOf) -> Mapping[str, Any]:
        with refusing("name"), store.writing() as connection:
            people.pause(connection, body.name, paused=body.paused)
        return {}

    @router.post("/finish")
    def finish(body: BatchOf) -> Mapping[str, Any]:
        with refusing("no_batch"), store.writing() as connection:
            batches.finish(connection, body.batch, is_finished=body.finished)
        return {}

    @router.get("/export/{shape}")
    def exported(shape: str) -> FileResponse:
        folder = Path(tempfile.mkdtemp(prefix="label-export-"))
        try:
            with refusing("no_export"):
                export(store, folder / "out", shape)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return FileResponse(
            folder / "out",
            media_type=SHAPES[shape].media_type,
            filename=f"{shape}.{SHAPES[shape].suffix}",
            background=BackgroundTask(shutil.rmtree, folder, ignore_errors=True),
        )

    return router
