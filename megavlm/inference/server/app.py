"""The HTTP routes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from megavlm.config.errors import UserError
from megavlm.data.schema import Turn
from megavlm.inference.sampling import Sampling
from megavlm.inference.server.errors import ApiError, bad_request, shown
from megavlm.inference.server.images import load_images
from megavlm.inference.server.limits import Limits
from megavlm.inference.server.request import ChatRequest, parse_request
from megavlm.inference.server.worker import Job, Worker
from megavlm.inference.session import Asked, Piece, Session, TokenReport

_Pieces = AsyncGenerator[tuple[int, Piece], None]


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

    @cached_property
    def most_text(self) -> int:
        """Characters above which no text fits the context: all of its tokens the longest that there is."""
        tokenizer = self.model.tokenizer
        longest = max(len(tokenizer.decode([token])) for token in range(tokenizer.vocab_size))
        return self.model.context * (longest + 1)  # a space before a word may not be decoded

    def check_length(self, turns: Sequence[Turn]) -> None:
        """Refuse a text that is far too long before it costs a tokenizer's time.

        Raises:
            ApiError: it is.
        """
        length = sum(len(turn.text) for turn in turns)
        if length > self.most_text:
            raise bad_request(
                f"the context has {self.model.context} tokens, and the prompt {length} characters: it cannot fit",
                "messages",
                "context_length_exceeded",
            )

    def jobs(self, asked: Asked, request: ChatRequest) -> list[Job]:
        """Return the jobs of a request whose pictures are loaded, one for each choice.

        Raises:
            ApiError: it does not fit the context, or a text holds control tokens.
        """
        try:
            asked = self.model.encoded(asked)
        except UserError as error:
            raise bad_request(str(error), "messages") from None
        assert asked.tokens is not None
        count = len(asked.tokens)
        room = self.model.context - count
        wanted = min(self.limits.new_tokens, room) if request.max_new_tokens is None else request.max_new_tokens
        if room < 1 or wanted > room:
            raise bad_request(
                f"the context has {self.model.context} tokens; the prompt takes {count}, and the answer may take "
                f"{shown(request.max_new_tokens or 1)}",
                "messages" if room < 1 else request.length_key,
                "context_length_exceeded",
            )
        seeds = [request.sampling.seed + choice for choice in range(request.choices)]
        return [Job(asked, count, wanted, replace(request.sampling, seed=seed), request.stop) for seed in seeds]


def make_app(service: Service) -> FastAPI:
    """Return the application."""
    # FastAPI's pages about itself load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())
    assert service.most_text  # looks at the whole vocabulary, which should not hold up the first request
    card = {"id": service.name, "object": "model", "created": started, "owned_by": "megavlm"}

    async def health(_: Request) -> Response:
        worker = service.worker
        body = {
            "status": worker.state,
            "requests": worker.held,
            "slots": worker.slots,
            "answered": worker.answered,
            "tokens": worker.tokens,
        }
        return JSONResponse(body, 503 if worker.stopping else 200)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != service.name:
            raise ApiError(404, f"there is no such model; this one is served: {service.name}", code="model_not_found")
        return JSONResponse(card)

    async def completions(request: Request) -> Response:
        # A stream's slots are freed when it has been sent, which is after this function.
        async with contextlib.AsyncExitStack() as held:
            service.worker.take_slots(1)
            held.callback(service.worker.free_slots, 1)
            try:
                return await _complete(service, request, held)
            except ClientDisconnect:  # while its request came, or its answer was made
                return Response(status_code=499)  # nobody reads it

    app.add_route("/health", health, ["GET"])
    app.add_route("/v1/models", models, ["GET"])
    app.add_route("/v1/models/{name:path}", model, ["GET"])
    app.add_route("/v1/chat/completions", completions, ["POST"])
    app.add_route("/v1/{rest:path}", _absent, ["GET", "POST", "PUT", "PATCH", "DELETE"])  # before the page's own 404
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)
    return app


async def _absent(request: Request) -> Response:
    known = request.url.path in ("/v1/chat/completions", "/v1/models")
    raise ApiError(
        405 if known else 404,
        f"{request.method} {request.url.path[:100]}: this server has POST /v1/chat/completions and GET /v1/models",
        code="unknown_url",
    )


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code, error.headers)


async def _bug(_: Request, error: Exception) -> Response:
    # Starlette raises it once more after this, and uvicorn logs it.
    said = ApiError(500, "the server failed; its log says why", code="server_failed")
    return JSONResponse(said.body, said.status)


async def _complete(service: Service, http: Request, held: contextlib.AsyncExitStack) -> Response:
    """Answer a request.

    Args:
        service: what answers.
        http: the request.
        held: what it holds; a stream takes it along.
    """
    body = await json_body(http, service.limits)
    request = parse_request(body, service.name, service.defaults, service.limits)
    service.worker.take_slots(request.choices - 1)
    held.callback(service.worker.free_slots, request.choices - 1)
    service.check_length(request.turns)
    images = await load_images(request.images, service.limits, service.allow_remote_images)
    jobs = service.jobs(Asked(request.turns, images), request)
    frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    pieces = service.worker.answer(jobs)
    held.push_async_callback(pieces.aclose)
    if not request.stream:
        said = [one async for one in _until_gone(http, pieces)]
        return JSONResponse(_completion(frame, jobs, said))
    # What is wrong with the request still gets a status of its own.
    async with contextlib.aclosing(_until_gone(http, pieces)) as watched:
        first = await anext(watched)
    return _EventStream(held.pop_all(), _events(frame, jobs, first, pieces, request.include_usage))


async def json_body(http: Request, limits: Limits) -> Any:
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
        raise bad_request(f"the body cannot be read as JSON: {error}") from None


async def _until_gone(http: Request, pieces: _Pieces) -> _Pieces:
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
            try:
                await asyncio.wait({following, watch}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                left = not following.done()
                if left:  # it must have ended before the iterator can be closed
                    following.cancel()
                    await asyncio.gather(following, return_exceptions=True)
            if left:
                raise ClientDisconnect
            try:
                yield following.result()
            except StopAsyncIteration:
                return
    finally:
        watch.cancel()


def _usage(jobs: Sequence[Job], tokens: Mapping[int, int]) -> dict[str, int]:
    """Return the counts: the prompt once, the answers of all choices."""
    prompt, completion = jobs[0].prompt_tokens, sum(tokens.values())
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _completion(frame: dict[str, Any], jobs: Sequence[Job], said: Sequence[tuple[int, Piece]]) -> dict[str, Any]:
    choices, tokens = [], {}
    for index in range(len(jobs)):
        pieces = [piece for place, piece in said if place == index]
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        finish = pieces[-1].finish
        reports = [piece.report for piece in pieces if piece.report is not None]
        logprobs = _logprobs(reports) if jobs[index].sampling.report is not None else None
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
        tokens[index] = pieces[-1].tokens
    return {**frame, "object": "chat.completion", "choices": choices, "usage": _usage(jobs, tokens)}


def _logprobs(reports: Sequence[TokenReport]) -> dict[str, Any]:
    """Return log probabilities as OpenAI's API has them."""

    def entry(text: str, value: float) -> dict[str, Any]:
        whole = "\ufffd" not in text  # else a part of a character, whose bytes the tokenizer does not tell
        # JSON has no infinity; this is OpenAI's number for what is next to impossible.
        return {"token": text, "logprob": max(value, -9999.0), "bytes": list(text.encode()) if whole else None}

    content = [
        {**entry(one.text, one.log_probability), "top_logprobs": [entry(text, value) for text, value in one.best]}
        for one in reports
    ]
    return {"content": content, "refusal": None}


async def _events(
    frame: dict[str, Any], jobs: Sequence[Job], first: tuple[int, Piece], rest: _Pieces, usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events."""
    frame = {**frame, "object": "chat.completion.chunk"}

    def chunk(index: int, delta: dict[str, str], finish: str | None = None, reports: Sequence[TokenReport] = ()) -> str:
        logprobs = _logprobs(reports) if reports else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _event({**frame, "choices": [choice], **({"usage": None} if usage else {})})

    for index in range(len(jobs)):
        yield chunk(index, {"role": "assistant", "content": ""})
    tokens = {}
    try:
        async for index, piece in _chained(first, rest):
            tokens[index] = piece.tokens
            if piece.text or piece.report is not None:
                yield chunk(index, {"content": piece.text}, reports=[piece.report] if piece.report else [])
            if piece.finish is not None:
                yield chunk(index, {}, piece.finish)
    except ApiError as error:
        yield _event(error.body)
    else:
        if usage:
            yield _event({**frame, "choices": [], "usage": _usage(jobs, tokens)})
    yield "data: [DONE]\n\n"


async def _chained(first: tuple[int, Piece], rest: _Pieces) -> _Pieces:
    yield first
    async for one in rest:
        yield one


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class _EventStream(StreamingResponse):
    """Events, and what their request holds until they are sent or nobody reads them."""

    def __init__(self, held: contextlib.AsyncExitStack, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        async with self.held:
            with contextlib.suppress(ClientDisconnect):
                await super().__call__(scope, receive, send)
