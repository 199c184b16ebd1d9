"""The routes of a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from speechllm.serve.errors import APIError, api_error, busy, http_error, unexpected_error
from speechllm.serve.guard import Guard
from speechllm.serve.limits import Place
from speechllm.serve.realtime import serve_session
from speechllm.serve.responses import delta, done, response, server_sent
from speechllm.serve.service import Service
from speechllm.serve.uploads import Asked, Upload, read_fields, read_form
from speechllm.transcribe.formats import Recording, Segment

_STATIC = Path(__file__).parent / "static"
_Result = TypeVar("_Result")


def make_app(service: Service, is_loopback: bool = True) -> Starlette:
    """The application; its lifespan starts and stops the engine.

    Args:
      is_loopback: whether it listens to this machine alone (`guard.Guard`).
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.to_thread(service.engine.stop)
        service.threads.shutdown(wait=False, cancel_futures=True)

    async def transcriptions(request: Request) -> Response:
        return await _upload(request, service, translates=False)

    async def translations(request: Request) -> Response:
        return await _upload(request, service, translates=True)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [service.description()]})

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JSONResponse(service.description())

    async def health(request: Request) -> Response:
        places = service.places
        status = "draining" if places.is_closed else "ok" if service.engine.is_alive else "failed"
        record = {"status": status, "streams": places.taken, "max_streams": places.most}
        return JSONResponse(record, 200 if status == "ok" else 503)

    async def metrics(request: Request) -> Response:
        service.metrics.queue.set(service.engine.waiting)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def realtime(socket: WebSocket) -> None:
        await serve_session(socket, service)

    routes: list[BaseRoute] = [
        Mount(
            "/v1",
            routes=[
                Route("/audio/transcriptions", transcriptions, methods=["POST"]),
                Route("/audio/translations", translations, methods=["POST"]),
                Route("/models", models),
                Route("/models/{name:path}", model),
                WebSocketRoute("/realtime", realtime),
            ],
        ),
        Route("/health", health),
        Route("/metrics", metrics),
        Mount("/", StaticFiles(directory=_STATIC, html=True)),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, service=service, is_loopback=is_loopback)],
        exception_handlers={APIError: api_error, HTTPException: http_error, Exception: unexpected_error},
        lifespan=lifespan,
    )


async def _upload(request: Request, service: Service, translates: bool) -> Response:
    place = service.places.take()
    if place is None:
        raise busy(f"all {service.places.most} places are taken", "too_many_streams")
    is_working = False
    try:
        form = await read_form(request, service.options)
        try:
            asked = read_fields(form, service, translates)
        except BaseException:
            await form.close()
            raise
        is_working = True
        return await _answer(request, service, asked, place, translates)
    except ClientDisconnect:
        return Response(status_code=499)
    finally:
        if not is_working:
            place.release()


async def _answer(request: Request, service: Service, asked: Asked, place: Place, translates: bool) -> Response:
    upload = Upload(service, asked.file.file, asked, place)
    upload.start()
    if asked.stream:
        segments = upload.segments()
        # what is wrong with the audio is known before its first segment: then the status says so
        first = await _unless_gone(request, _next(segments))
        events = _events(upload, first, segments)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def whole() -> list[Segment]:
        async with aclosing(upload.segments()) as segments:
            return [segment async for segment in segments]

    recording = Recording("upload", "", 0.0, await _unless_gone(request, whole()))
    recording = replace(recording, duration=upload.duration)
    task = "translate" if translates else "transcribe"
    return response(recording, asked.response_format, task, asked.language, asked.granularities, asked.temperature)


async def _next(segments: AsyncGenerator[Segment, None]) -> Segment | None:
    return await anext(segments, None)


async def _events(upload: Upload, first: Segment | None, rest: AsyncGenerator[Segment, None]) -> AsyncIterator[str]:
    """The server-sent events of an upload; an error, when the status has been sent already, is one too."""
    texts: list[str] = []
    segment = first
    try:
        while segment is not None:
            if segment.text:
                yield server_sent(delta(segment.text, not texts))
                texts.append(segment.text)
            segment = await _next(rest)
        yield server_sent(done(" ".join(texts), upload.duration))
    except APIError as error:
        yield server_sent({"error": error.body()})
    finally:
        upload.cancel()
    yield "data: [DONE]\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
      ClientDisconnect: it has.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
