"""`/v1/videos`, as other servers of video have it: a request becomes a job, which is asked after until it is done.

POST   /v1/videos                JSON or a form -> a job
POST   /v1/videos/sync           the same -> the video
GET    /v1/videos                jobs
GET    /v1/videos/{id}           a job
GET    /v1/videos/{id}/content   its video
GET    /v1/videos/{id}/preview   what its latents show, while it runs
DELETE /v1/videos/{id}           ends it, or deletes it with its video
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib.metadata
import json
import os
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from wanjax.errors import InputError, one_line
from wanjax.serving import replies
from wanjax.serving.jobs import OVER, FullError, Job, Jobs
from wanjax.serving.previews import animation
from wanjax.serving.requests import FILES, MOST_PICTURES, Reader
from wanjax.serving.schema import order_schema
from wanjax.serving.worker import Worker

KEY = "WANJAX_API_KEY"
"""The environment variable whose value requests must bring as `Authorization: Bearer`; without it all are served."""
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": replies.Problem}, "5XX": {"model": replies.Problem}}
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": order_schema(form=False)},
            "multipart/form-data": {"schema": order_schema(form=True)},
        },
    }
}
MP4: dict[int | str, dict[str, Any]] = {200: {"content": {"video/mp4": {}}, "description": "the video"}}
RETRY_SECONDS = "30"


class Server:
    """The application and what it serves.

    Args:
      reader: of requests.
      jobs: accepted ones.
      worker: that runs them; started and stopped with the application.
    """

    def __init__(self, reader: Reader, jobs: Jobs, worker: Worker):
        self.reader, self.jobs, self.worker = reader, jobs, worker
        self.metrics = worker.metrics
        self.app = FastAPI(
            title="wanjax",
            version=importlib.metadata.version("wanjax"),
            description=__doc__.partition("\n")[0] if __doc__ else "",
            lifespan=self.lifespan,
            exception_handlers=self.handlers(),
        )
        self.add_routes()

    def handlers(self) -> dict[Any, Any]:
        """What answers where something is raised."""
        return {
            InputError: lambda _, error: self.problem(400, str(error)),
            FullError: lambda *_: self.full(),
            RequestValidationError: lambda _, error: self.problem(422, validation_line(error)),
            HTTPException: lambda _, error: self.problem(error.status_code, str(error.detail), error.headers),
            Exception: lambda _, error: self.problem(500, f"{type(error).__name__}; see the server's output"),
        }

    def add_routes(self) -> None:
        """Paths and what answers them."""
        app, locked = self.app, [Depends(check_key)]
        app.add_api_route("/v1/videos", self.create, methods=["POST"], responses=ERRORS, openapi_extra=BODY,
                          dependencies=locked, response_model=replies.Video)  # fmt: skip
        app.add_api_route("/v1/videos/sync", self.create_and_wait, methods=["POST"], responses=ERRORS | MP4,
                          openapi_extra=BODY, dependencies=locked, response_class=FileResponse)  # fmt: skip
        app.add_api_route("/v1/videos", self.list, responses=ERRORS, dependencies=locked)
        app.add_api_route("/v1/videos/{id}", self.get, responses=ERRORS, dependencies=locked)
        app.add_api_route("/v1/videos/{id}", self.delete, methods=["DELETE"], responses=ERRORS, dependencies=locked)
        app.add_api_route("/v1/videos/{id}/content", self.content, responses=ERRORS | MP4, dependencies=locked,
                          response_class=FileResponse)  # fmt: skip
        webp: dict[int | str, dict[str, Any]] = {200: {"content": {"image/webp": {}}, "description": "moving"}}
        app.add_api_route("/v1/videos/{id}/preview", self.preview, responses=ERRORS | webp, dependencies=locked,
                          response_class=Response)  # fmt: skip
        app.add_api_route("/v1/models", self.models, responses=ERRORS, dependencies=locked)
        app.add_api_route("/health", self.health, responses=ERRORS)
        app.add_api_route("/metrics", self.counters, responses=ERRORS, dependencies=locked, response_class=Response)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """The worker works while the application answers."""
        self.worker.start()
        yield
        self.worker.stop()
        await run_in_threadpool(self.worker.join)

    def problem(self, status: int, line: str, headers: Any = None) -> JSONResponse:
        """An answer that is one line, in the field's form."""
        self.metrics.refused.labels(str(status)).inc()
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse(
            {"error": {"message": one_line(line), "type": kind, "code": str(status)}}, status, dict(headers or {})
        )

    def full(self) -> JSONResponse:
        """As many wait as may."""
        line = f"{self.jobs.most_waiting} requests wait already; that many are accepted; come again later"
        return self.problem(429, line, {"Retry-After": RETRY_SECONDS})

    # ---------------------------------------------------------------------------------------------------------- answers

    async def accept(self, request: Request, key: str | None) -> Job:
        """The job of a request's body."""
        check_size(request, self.reader.limits.max_upload)
        body, files = await read_body(request, self.reader.limits.max_upload)
        order = await run_in_threadpool(self.reader.read, body, files, key)
        job, is_new = await run_in_threadpool(self.jobs.add, order)
        if is_new:
            self.metrics.accepted.inc()
        return job

    async def create(
        self, request: Request, idempotency_key: Annotated[str | None, Header(max_length=200)] = None
    ) -> replies.Video:
        """Make a video: the answer is a job. A second request of the same Idempotency-Key gets the first one's job."""
        return replies.video(await self.accept(request, idempotency_key), self.worker, self.reader.model)

    async def create_and_wait(
        self, request: Request, idempotency_key: Annotated[str | None, Header(max_length=200)] = None
    ) -> Response:
        """Make a video and answer with it. The job ends where the client goes away."""
        job: Job | None = await self.accept(request, idempotency_key)
        while job is not None and job.state not in OVER:
            await asyncio.sleep(0.1)
            if await request.is_disconnected():
                await run_in_threadpool(self.worker.cancel, job.id)
            job = self.jobs.get(job.id)
        if job is None or job.state != "completed":
            why = "it was deleted" if job is None else job.error or "it was cancelled"
            raise HTTPException(409, f"no video: {why}")
        return FileResponse(self.jobs.video(job.id), media_type="video/mp4", headers={"X-Video-Id": job.id})

    def list(
        self,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=100)] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> replies.VideoList:
        """Jobs, newest first unless asked otherwise, those behind `after`."""
        if after is not None:
            self.find(after)
        jobs = self.jobs.list(limit + 1, after, order == "desc")
        data = [replies.video(job, self.worker, self.reader.model) for job in jobs[:limit]]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return replies.VideoList(data=data, first_id=ends[0], last_id=ends[1], has_more=len(jobs) > limit)

    def get(self, id: str) -> replies.Video:
        """A job: its state, how far it is, and what it will be."""
        return replies.video(self.find(id), self.worker, self.reader.model)

    def delete(self, id: str) -> replies.Deleted:
        """End a job that waits or runs, within a step; delete one that is over, with its video."""
        job = self.find(id)
        if job.state in OVER or not self.worker.cancel(id):
            self.jobs.delete(id)
        return replies.Deleted(id=id)

    def content(self, id: str) -> FileResponse:
        """The video of a job."""
        job = self.find(id)
        if job.state != "completed":
            raise HTTPException(409, f"video {id} is {job.state}; a completed one has content; ask after it until then")
        return FileResponse(self.jobs.video(id), media_type="video/mp4", filename=f"{id}.mp4")

    def preview(self, id: str) -> Response:
        """What the latents of a running job show, as a small moving WebP."""
        job, live = self.find(id), self.worker.live
        if live is None or live.id != id or live.preview is None:
            raise HTTPException(409, f"video {id} is {job.state}; a preview is there while steps are taken")
        return Response(animation(live.preview, job.settings["fps"]), media_type="image/webp")

    def models(self) -> replies.Models:
        """The one checkpoint that is served."""
        return replies.Models(data=[replies.Model(id=self.reader.model)])

    def health(self) -> replies.Health:
        """Whether requests are worked on; 503 where something is wrong with the machine or the weights."""
        if self.worker.failure is not None:
            raise HTTPException(503, self.worker.failure)
        status = "ok" if self.worker.is_ready else "starting"
        return replies.Health(status=status, queued=self.jobs.count("queued"), running=self.jobs.count("running"))

    def counters(self) -> Response:
        """For Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def find(self, id: str) -> Job:
        """The job of this id, or an answer that there is none."""
        job = self.jobs.get(id) if id.isascii() else None
        if job is None:
            raise HTTPException(404, f"video {id[:100]}; there is none of this id; GET /v1/videos lists all")
        return job


def check_key(given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]) -> None:
    """Whether a request brings the key, if there is one."""
    key = os.environ.get(KEY)
    if key and not hmac.compare_digest((given.credentials if given else "").encode(), key.encode()):
        what = "a wrong key" if given else "no key"
        raise HTTPException(401, f"{what}; Authorization: Bearer KEY is needed", {"WWW-Authenticate": "Bearer"})


def check_size(request: Request, most: int) -> None:
    """Refuse by what the header says, before anything is read."""
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 20 or int(length) > most * 2**20:
        raise HTTPException(413, f"{length[:20]} bytes; up to {most} MB are accepted; send smaller pictures")


async def read_body(request: Request, most: int) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """Values and pictures of a JSON or form body.

    Raises:
      InputError: it is neither.
      HTTPException: it is larger than its header said.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data", "application/x-www-form-urlencoded"):
        raise HTTPException(415, f"a body of {kind[:80]!r}; application/json or multipart/form-data is accepted")
    limit_stream(request, most)
    if kind == "application/json":
        try:
            body = json.loads(await request.body())
            json.dumps(body, ensure_ascii=False).encode()  # half a character is none
        except (ValueError, RecursionError) as error:
            raise InputError(f"the body is no JSON ({one_line(error)[:200]}); an object is accepted") from error
        if not isinstance(body, dict):
            raise InputError(f"the body is JSON's {type(body).__name__}; an object is accepted; change it")
        return body, {}
    return await read_form(request, most)


async def read_form(request: Request, most: int) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """Values and pictures of a form, whose `frame_images` is JSON."""
    try:
        form = await request.form(max_files=MOST_PICTURES, max_fields=200, max_part_size=most * 2**20)
    except (ValueError, KeyError) as error:
        raise InputError(f"the form cannot be read ({one_line(error)[:200]}); send multipart/form-data") from error
    try:
        return await read_parts(form)
    finally:
        await form.close()


async def read_parts(form: FormData) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """Values and pictures of a form that is there."""
    body: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in FILES:
                raise InputError(f"a file named {name!r}; accepted: {', '.join(FILES)}; change the name")
            files.setdefault(name, []).append(await value.read())
        elif name in FILES:
            raise InputError(f"{name} is text; a picture's file is accepted; upload it")
        elif name in body:
            raise InputError(f"{name} twice; one value is accepted; leave one out")
        elif value != "":  # a form sends empty what was left empty
            body[name] = value
    if isinstance(body.get("frame_images"), str):
        try:
            body["frame_images"] = json.loads(body["frame_images"])
        except (ValueError, RecursionError) as error:
            raise InputError(f"frame_images is no JSON ({error}); a list is accepted; change it") from error
    return body, files


def limit_stream(request: Request, most: int) -> None:
    """From here on reading a body ends where it is larger than accepted, whatever its header said."""
    receive, left = request.receive, most * 2**20

    async def limited() -> Any:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, f"a request of more than {most} MB; that much is accepted; send smaller pictures")
        return message

    request._receive = limited


def validation_line(error: RequestValidationError) -> str:
    """FastAPI's finding about a path, query or header as a line."""
    found = error.errors()[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}; see /docs"
