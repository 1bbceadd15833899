"""The HTTP routes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from megavlm.data.chat import encode_prompt
from megavlm.inference.sampling import Sampling
from megavlm.inference.server.errors import ApiError, bad_request
from megavlm.inference.server.images import load_image
from megavlm.inference.server.limits import Limits
from megavlm.inference.server.request import ChatRequest, parse_request
from megavlm.inference.server.worker import Job, Worker
from megavlm.inference.session import Asked, Piece, Session

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What the routes need."""

    name: str
    """Of the model."""
    model: Session
    worker: Worker
    limits: Limits
    defaults: Sampling
    allow_remote_images: bool = False

    def job(self, asked: Asked, request: ChatRequest) -> Job:
        """Return the job of a request whose pictures are loaded.

        Raises:
            ApiError: it does not fit the context, or a text holds control tokens.
        """
        recipe = self.model.recipe
        try:
            tokens = encode_prompt(
                asked.turns, self.model.tokenizer, recipe.model.tokens_per_image, recipe.data.system_message
            )
        except ValueError as error:
            raise bad_request(str(error), "messages") from None
        room = self.model.context - len(tokens)
        wanted = min(self.limits.new_tokens, room) if request.max_new_tokens is None else request.max_new_tokens
        if room < 1 or wanted > room:
            raise bad_request(
                f"the context has {self.model.context} tokens; the prompt takes {len(tokens)}, and the answer may take "
                f"{request.max_new_tokens or 1}",
                "messages" if room < 1 else "max_tokens",
                "context_length_exceeded",
            )
        return Job(asked, len(tokens), wanted, request.sampling, request.stop)


def make_app(service: Service) -> FastAPI:
    """Return the application."""
    # FastAPI's pages about itself load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())
    card = {"id": service.name, "object": "model", "created": started, "owned_by": "megavlm"}

    async def health(_: Request) -> Response:
        worker = service.worker
        state = "stopping" if worker.stopping else "ok"
        body = {"status": state, "requests": worker.held, "slots": worker.slots, "answered": worker.answered}
        return JSONResponse(body, 503 if worker.stopping else 200)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != service.name:
            raise ApiError(404, f"there is no such model; this one is served: {service.name}", code="model_not_found")
        return JSONResponse(card)

    async def completions(request: Request) -> Response:
        service.worker.take_slot()
        kept = False
        try:
            response = await _complete(service, request)
            kept = isinstance(response, _Stream)
            return response
        finally:
            if not kept:
                service.worker.free_slot()

    app.add_route("/health", health, ["GET"])
    app.add_route("/v1/models", models, ["GET"])
    app.add_route("/v1/models/{name:path}", model, ["GET"])
    app.add_route("/v1/chat/completions", completions, ["POST"])
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    return app


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code, error.headers)


async def _complete(service: Service, http: Request) -> Response:
    """Answer a request; its slot is held."""
    body = await _json(http, service.limits)
    request = parse_request(body, service.name, service.defaults, service.limits)
    images = []
    for number, part in enumerate(request.images, 1):
        images.append(await load_image(part.url, number, part.param, service.limits, service.allow_remote_images))
    job = service.job(Asked(request.turns, tuple(images)), request)
    frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    pieces = service.worker.answer(job)
    try:
        if not request.stream:
            said = [piece async for piece in _until_gone(http, pieces)]
            return JSONResponse(_completion(frame, job, said))
        # What is wrong with the request still gets a status of its own.
        async with contextlib.aclosing(_until_gone(http, pieces)) as watched:
            first = await anext(watched)
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
    except BaseException:
        job.gone = True
        raise
    return _Stream(service.worker, job, _events(frame, job, first, pieces, request.include_usage))


async def _json(http: Request, limits: Limits) -> Any:
    """Return the body.

    Raises:
        ApiError: it is too large (413), too slow (408), or no JSON (400, 415).
    """
    # A page of another site can make a browser send other types without asking us first.
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send Content-Type: application/json")
    too_large = ApiError(413, f"the request is larger than {limits.body_mib} MiB", code="request_too_large")
    told = http.headers.get("content-length", "")
    if told.isdigit() and int(told) > limits.bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in http.stream():
                body += chunk
                if len(body) > limits.bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the request took longer than {limits.seconds} s to arrive") from None
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is no JSON: {error}") from None


async def _until_gone(http: Request, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    """Yield pieces while the client is there.

    Raises:
        ClientDisconnect: it left.
    """

    async def gone() -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(0.25)

    watch = asyncio.ensure_future(gone())
    try:
        while True:
            following = asyncio.ensure_future(anext(pieces))
            done, _ = await asyncio.wait({following, watch}, return_when=asyncio.FIRST_COMPLETED)
            if following not in done:
                following.cancel()
                raise ClientDisconnect
            try:
                yield following.result()
            except StopAsyncIteration:
                return
    finally:
        watch.cancel()


def _usage(job: Job, completion: int) -> dict[str, int]:
    prompt = job.prompt_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _completion(frame: dict[str, Any], job: Job, said: list[Piece]) -> dict[str, Any]:
    message = {"role": "assistant", "content": "".join(piece.text for piece in said), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": said[-1].finish}
    return {**frame, "object": "chat.completion", "choices": [choice], "usage": _usage(job, said[-1].tokens)}


async def _events(
    frame: dict[str, Any], job: Job, first: Piece, rest: AsyncIterator[Piece], usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events."""

    def chunk(delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        more = {"usage": None} if usage else {}
        return _event({**frame, "object": "chat.completion.chunk", "choices": [choice], **more})

    yield chunk({"role": "assistant", "content": ""})
    last = first
    try:
        async for piece in _chained(first, rest):
            last = piece
            if piece.text:
                yield chunk({"content": piece.text})
            if piece.finish is not None:
                yield chunk({}, piece.finish)
    except ApiError as error:
        yield _event(error.body)
    else:
        if usage:
            yield _event({**frame, "object": "chat.completion.chunk", "choices": [], "usage": _usage(job, last.tokens)})
    yield "data: [DONE]\n\n"


async def _chained(first: Piece, rest: AsyncIterator[Piece]) -> AsyncGenerator[Piece, None]:
    yield first
    if first.finish is None:
        async for piece in rest:
            yield piece


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class _Stream(StreamingResponse):
    """Events that hold the request's slot until they are sent or nobody reads them."""

    def __init__(self, worker: Worker, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.worker, self.job = worker, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            with contextlib.suppress(ClientDisconnect):
                await super().__call__(scope, receive, send)
        finally:
            self.job.gone = True
            self.worker.free_slot()
