"""The web page: files of this package, and three small routes beside the API that it asks its questions through.

The page is plain HTML, CSS and JavaScript without a build step. Its content security policy lets it load nothing from
elsewhere and run nothing but these files, whatever an answer or a file's name holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megavlm.data.image_header import MAX_SIDE
from megavlm.data.images import ImageError
from megavlm.data.media import ImageLayout
from megavlm.data.seen import said, seen
from megavlm.inference.boxes import box_space
from megavlm.inference.server.about import About, described, offered
from megavlm.inference.server.app import Service, json_body
from megavlm.inference.server.errors import ApiError, bad_request, shown

_FOLDER = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: load from this server alone, and run no script that stands in text."""
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, service: Service, about: About) -> None:
    """Add the page at ``/``, and what it needs under ``/page/``."""
    pictures = dict(picture for one in offered(service, about) for picture in one.pictures)
    # Examples may show a picture under two names, but no two pictures under one.
    files = {**_files(), **pictures}
    told = described(service, about)
    space = box_space(about.told_by, service.model.recipe.model)

    async def page(request: Request) -> Response:
        return _file(request, "index.html", files)

    async def file(request: Request) -> Response:
        return _file(request, request.path_params["name"], files)

    async def model(_: Request) -> Response:
        return JSONResponse(told, headers={"Cache-Control": "no-store"})

    async def plan(request: Request) -> Response:
        layout = _layout(service, request.query_params)
        planes = [asdict(plane) for plane in seen(service.model.plan, layout)]
        return JSONResponse({"tokens": layout.tokens, "text": said(service.model.plan, layout), "planes": planes})

    async def boxes(request: Request) -> Response:
        body = await json_body(request, service.limits)
        if not isinstance(body, dict) or not isinstance(body.get("text"), str):
            raise bad_request("text: the answer whose boxes are wanted is missing", "text")
        layout = _layout(service, body)
        found = space.find(body["text"], layout)
        return JSONResponse({"boxes": [{"name": one.name, "sides": one.sides} for one in found]})

    app.add_route("/", page, ["GET"])
    app.add_route("/page/model.json", model, ["GET"])
    app.add_route("/page/plan", plan, ["GET"])
    app.add_route("/page/boxes", boxes, ["POST"])
    app.add_route("/page/{name}", file, ["GET"])


@cache
def _files() -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}


def _file(request: Request, name: str, files: Mapping[str, bytes]) -> Response:
    if name not in files:
        raise ApiError(404, f"the page has no file {shown(name)}", code="unknown_url")
    tag = f'"{sha256(files[name]).hexdigest()[:20]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={**_HEADERS, "ETag": tag})
    kind = _TYPES[Path(name).suffix]
    return Response(files[name], headers={**_HEADERS, "ETag": tag, "Content-Type": kind})


def _layout(service: Service, asked: Mapping[str, Any]) -> ImageLayout:
    """Return the layout of a picture of ``width`` x ``height``, one of ``images``.

    Raises:
        ApiError: these are no sizes, or the model cannot have such a picture.
    """
    sizes = []
    for key, most in (("width", MAX_SIDE), ("height", MAX_SIDE), ("images", service.limits.images)):
        value = str(asked.get(key, 1 if key == "images" else ""))
        if not (value.isascii() and value.isdigit() and len(value) < 7 and 1 <= int(value) <= most):
            raise bad_request(f"{key}: {shown(value)} is no whole number from 1 to {most}", key)
        sizes.append(int(value))
    try:
        return service.model.plan.plan(*sizes)
    except ImageError as error:
        raise bad_request(str(error), "width", "invalid_image") from None
