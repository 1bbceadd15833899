"""The web page, made with NiceGUI: pictures, questions, answers as they come, boxes drawn.

Each open page is a conversation of its own. Its questions go through the same queue and limits as those of the API.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import re
import secrets
import warnings

from fastapi import FastAPI
from nicegui import events, ui
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send

from megavlm.data.images import decode_with_pil
from megavlm.data.schema import Turn
from megavlm.inference.boxes import draw_boxes
from megavlm.inference.sampling import Sampling
from megavlm.inference.server.app import Service
from megavlm.inference.server.errors import ApiError
from megavlm.inference.server.images import check_image
from megavlm.inference.server.request import ChatRequest
from megavlm.inference.session import Asked
from megavlm.inference.turns import user_turn, without_control_tokens

_SHOWN = 1024
"""Longest side of a picture on the page, in pixels."""


def add_page(app: FastAPI, service: Service) -> None:
    """Add the page at ``/``."""

    @ui.page("/", title=f"{service.name} - megavlm")
    def page() -> None:
        _Conversation(service).build()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks at every object there is, and torch has some that complain
        ui.run_with(app, mount_path="/", show_welcome_message=False)
    app.add_middleware(_UploadLimit, limit=service.limits.bytes)


class _UploadLimit:
    """Refuse what a page's own routes would read without a bound.

    Args:
        app: what is guarded.
        limit: most bytes of a request.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 413 or 411."""
        if scope["type"] == "http" and scope["method"] == "POST" and not scope["path"].startswith("/v1/"):
            length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
            if not length.isdigit() or int(length) > self.limit:
                status = 413 if length.isdigit() else 411
                await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
                await send({"type": "http.response.body", "body": b""})
                return
        await self.app(scope, receive, send)


class _Conversation:
    """What one open page shows."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.busy = False

    def build(self) -> None:
        """Lay the page out."""
        limits = self.service.limits
        with ui.header().classes("items-center justify-between"):
            ui.label(f"megavlm: {self.service.name}").classes("text-lg")
            ui.button("New conversation", on_click=self.clear).props("flat color=white")
        with ui.column().classes("w-full max-w-3xl mx-auto pb-4"):
            self.talk = ui.column().classes("w-full")
        with ui.footer().classes("bg-white"), ui.column().classes("w-full max-w-3xl mx-auto gap-1"):
            self.shelf = ui.row()
            with ui.row().classes("w-full items-end no-wrap"):
                self.upload = ui.upload(
                    label="Pictures", multiple=True, auto_upload=True, on_upload=self.take,
                    max_file_size=limits.bytes, max_files=limits.images,
                    on_rejected=lambda: ui.notify(
                        f"At most {limits.images} pictures, each below {limits.body_mib} MiB", type="negative"
                    ),
                ).props("accept=image/* flat bordered").classes("w-52")  # fmt: skip
                self.entry = ui.textarea(placeholder="Ask about the pictures").props("outlined autogrow rows=1")
                self.entry.classes("grow").on("keydown.enter.exact.prevent", self.send)
                self.send_button = ui.button("Send", on_click=self.send)
            self.temperature = ui.slider(min=0, max=2, step=0.1, value=self.service.defaults.temperature)
            ui.label().bind_text_from(self.temperature, "value", lambda value: f"Temperature {value:g}").classes(
                "text-xs text-grey-7"
            )
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.turns: list[Turn] = []
        self.images: list[bytes] = []
        self.waiting: list[bytes] = []
        self.talk.clear()
        self.shelf.clear()
        self.upload.reset()

    async def take(self, event: events.UploadEventArguments) -> None:
        """Put an uploaded picture beside the next question."""
        limits = self.service.limits
        if len(self.images) + len(self.waiting) >= limits.images:
            ui.notify(f"At most {limits.images} pictures; begin a new conversation", type="negative")
            return
        data = await event.file.read()
        try:
            await asyncio.to_thread(check_image, data, len(self.waiting) + 1, "", limits)
        except ApiError as error:
            ui.notify(f"{event.file.name}: {error}", type="negative")
            return
        self.waiting.append(data)
        with self.shelf:
            ui.image(await asyncio.to_thread(_shown, data, 128)).classes("w-16")

    async def send(self) -> None:
        """Ask what is written, and show the answer as it comes."""
        text = self.entry.value.strip()
        if self.busy or not text:
            return
        self.busy = True
        self.send_button.disable()
        try:
            await self._ask(text)
        except ValueError as error:  # also what the API would answer
            ui.notify(str(error), type="negative", multi_line=True)
        finally:
            self.busy = False
            self.send_button.enable()

    async def _ask(self, text: str) -> None:
        """Ask.

        Raises:
            ValueError: it cannot be answered; the conversation stays as it was.
        """
        service, shown = self.service, list(self.waiting)
        turns = (*self.turns, user_turn(text, len(shown)))
        images = (*self.images, *shown)
        most = max(1, min(service.limits.new_tokens, service.model.context // 2))
        asked, _ = service.model.cut(Asked(turns, images), most)
        sampling = Sampling(self.temperature.value, top_p=service.defaults.top_p, seed=secrets.randbits(62))
        request = ChatRequest(asked.turns, (), sampling, most, (), True, False)
        service.worker.take_slots(1)
        try:
            jobs = service.jobs(asked, request)
            with self.talk:
                with ui.chat_message(name="You", sent=True) as question:
                    for data in shown:
                        ui.image(await asyncio.to_thread(_shown, data, _SHOWN)).classes("w-64")
                    ui.label(text)
                with ui.chat_message(name=service.name) as reply:
                    label = ui.label("...").classes("whitespace-pre-wrap")
            answer = ""
            try:
                async with contextlib.aclosing(service.worker.answer(jobs)) as pieces:
                    async for _, piece in pieces:
                        answer += piece.text
                        label.text = _plain(answer)
            except ApiError:
                question.delete()
                reply.delete()
                raise
        finally:
            service.worker.free_slots(1)
        self.turns = [*turns, Turn("assistant", without_control_tokens(answer) or " ")]
        self.images, self.waiting = list(images), []
        self.entry.value = ""
        self.shelf.clear()
        self.upload.reset()
        if not answer.strip():
            label.text = "(an empty answer)"
        # An answer speaks of the picture that was shown last.
        drawn = await asyncio.to_thread(_drawn, self.images[-1], answer) if self.images else None
        if drawn is not None:
            with reply:
                ui.image(drawn).classes("w-96")
        ui.run_javascript("window.scrollTo(0, document.body.scrollHeight)")


def _small(data: bytes, side: int) -> Image.Image:
    picture = decode_with_pil(data)
    picture.thumbnail((side, side))
    return picture


def _shown(data: bytes, side: int) -> str:
    return _url(_small(data, side))


def _url(picture: Image.Image) -> str:
    """Return a picture as a data URL, which lies nowhere on the server's disk."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _drawn(data: bytes, answer: str) -> str | None:
    """Return the picture with the answer's boxes as a data URL, or None."""
    upright = io.BytesIO()
    picture = _small(data, _SHOWN)
    # Lines and names need pixels.
    if max(picture.size) < _SHOWN // 2:
        scale = _SHOWN // 2 / max(picture.size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    picture.save(upright, "PNG")
    drawn = draw_boxes(upright.getvalue(), answer)
    return None if drawn is None else _url(drawn)


def _plain(answer: str) -> str:
    """Return an answer without the tags of its boxes."""
    return re.sub(r"</?ref>|</box>", "", re.sub(r"<box>", " ", answer))
