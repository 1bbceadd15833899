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
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megavlm.config.errors import UserError
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
        _OpenPage(service).build()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks at every object there is, and torch has some that complain
        ui.run_with(app, mount_path="/", show_welcome_message=False)
    app.add_middleware(_UploadLimit, limit=service.limits.bytes, seconds=service.limits.seconds)


class _UploadLimit:
    """Refuse what a page's own routes would read without a bound.

    Args:
        app: what is guarded.
        limit: most bytes of a request.
        seconds: in which it must arrive.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 408, 411 or 413."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not length.isdigit() or int(length) > self.limit:
            await _refuse(send, 413 if length.isdigit() else 411)
            return
        deadline: float | None = asyncio.get_running_loop().time() + self.seconds
        late = False

        async def receive_in_time() -> Message:
            nonlocal deadline, late
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                deadline, late = None, True
                await _refuse(send, 408)
                return {"type": "http.disconnect"}
            if not message.get("more_body"):
                deadline = None
            return message

        async def send_unless_late(message: Message) -> None:
            if not late:
                await send(message)

        try:
            await self.app(scope, receive_in_time, send_unless_late)
        except Exception:
            if not late:
                raise


async def _refuse(send: Send, status: int) -> None:
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class _OpenPage:
    """What one open page shows."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.asking: asyncio.Task[None] | None = None
        self.halted = False

    def build(self) -> None:
        """Lay the page out."""
        ui.colors(primary="#1c5d99")
        ui.context.client.on_delete(self.leave)
        with ui.header().classes("items-center justify-between"):
            ui.label(f"megavlm: {self.service.name}").classes("text-lg")
            ui.button("New conversation", on_click=self.clear).props("flat color=white")
        with ui.column().classes("w-full max-w-3xl mx-auto pb-4"):
            self.talk = ui.column().classes("w-full").props('role=log aria-live=polite aria-label="Conversation"')
        with ui.footer().classes("bg-white text-black"), ui.column().classes("w-full max-w-3xl mx-auto gap-2"):
            self._build_entry()
        self.clear()

    def _build_entry(self) -> None:
        limits = self.service.limits
        self.shelf = ui.row().props('role=list aria-label="Pictures of the next question"')
        with ui.row().classes("w-full items-end no-wrap"):
            self.entry = ui.textarea("Your question").props("outlined autogrow rows=1").classes("grow")
            self.entry.on("keydown.enter.exact.prevent", self.send)
            self.send_button = ui.button("Send", on_click=self.send)
            self.stop_button = ui.button("Stop", on_click=self.halt).props("outline")
        with ui.row().classes("w-full items-center no-wrap gap-6"):
            self.upload = ui.upload(
                multiple=True, auto_upload=True, on_upload=self.take,
                max_file_size=limits.bytes, max_files=limits.images,
                on_rejected=lambda: _complain(f"At most {limits.images} pictures, each below {limits.body_mib} MiB"),
            ).props("accept=image/*").classes("hidden")  # fmt: skip
            add = ui.button("Add pictures", icon="add_photo_alternate").props("outline")
            add.on("click", js_handler=f"() => getElement({self.upload.id}).$refs.qRef.pickFiles()")
            ui.space()
            said = ui.label()
            self.temperature = ui.slider(min=0, max=2, step=0.1, value=self.service.defaults.temperature)
            self.temperature.props("aria-label=Temperature").classes("w-48")
            said.bind_text_from(self.temperature, "value", lambda value: f"Temperature {value:g}")

    def clear(self) -> None:
        """Begin anew."""
        self.leave()
        self.turns: list[Turn] = []
        self.images: list[bytes] = []
        self.waiting: list[bytes] = []
        self.talk.clear()
        self._show_busy(False)
        self._empty_entry()

    def leave(self) -> None:
        """Ask no further: the page is closed, or begins anew."""
        if self.asking is not None:
            self.asking.cancel()

    def halt(self) -> None:
        """Let the answer end here."""
        self.halted = True

    def _empty_entry(self) -> None:
        self.waiting.clear()
        self.entry.value = ""
        self.shelf.clear()
        self.upload.reset()

    def _show_busy(self, busy: bool) -> None:
        self.send_button.set_visibility(not busy)
        self.stop_button.set_visibility(busy)

    async def take(self, event: events.UploadEventArguments) -> None:
        """Put an uploaded picture beside the next question."""
        limits, name = self.service.limits, event.file.name
        data = await event.file.read()
        held = [*self.images, *self.waiting, data]
        if len(held) > limits.images or sum(map(len, held)) > limits.bytes:
            most = f"{limits.images} pictures and {limits.body_mib} MiB"
            _complain(f"{name}: a conversation has room for {most}; begin a new one")
            return
        try:
            await asyncio.to_thread(check_image, data, len(self.waiting) + 1, "", limits)
        except ApiError as error:
            _complain(f"{name}: {error}")
            return
        small = await asyncio.to_thread(_shown, data, 128)
        self.waiting.append(data)
        with self.shelf, ui.column().classes("items-center gap-0").props("role=listitem") as item:
            ui.image(small).classes("w-16").props["alt"] = name

            def remove() -> None:
                self.waiting[:] = [one for one in self.waiting if one is not data]
                item.delete()

            ui.button("Remove", on_click=remove).props("flat dense size=sm").props["aria-label"] = f"Remove {name}"

    async def send(self) -> None:
        """Ask what is written, and show the answer as it comes."""
        text = self.entry.value.strip()
        if self.asking is not None or not text:
            return
        self.asking, self.halted = asyncio.current_task(), False
        self._show_busy(True)
        try:
            await self._ask(text)
        except UserError as error:  # also what the API would answer
            _complain(str(error))
        except asyncio.CancelledError:  # by leave()
            return
        finally:
            self.asking = None
        self._show_busy(False)

    async def _ask(self, text: str) -> None:
        """Ask.

        Raises:
            UserError: it cannot be answered; the conversation stays as it was.
        """
        service, shown = self.service, list(self.waiting)
        question = user_turn(text, len(shown))
        service.check_length([question])
        turns = (*self.turns, question)
        images = (*self.images, *shown)
        most = max(1, min(service.limits.new_tokens, service.model.context // 2))
        asked, _ = service.model.cut(Asked(turns, images), most)
        sampling = Sampling(self.temperature.value, top_p=service.defaults.top_p, seed=secrets.randbits(62))
        request = ChatRequest(asked.turns, (), sampling, most, (), True, False)
        service.worker.take_slots(1)
        try:
            jobs = service.jobs(asked, request)
            with self.talk:
                with ui.chat_message(name="You", sent=True).classes("self-end") as bubble:
                    for number, data in enumerate(shown, 1):
                        small = await asyncio.to_thread(_shown, data, _SHOWN)
                        ui.image(small).classes("w-64").props(f'alt="Picture {number}"')
                    ui.label(text)
                with ui.chat_message(name=service.name) as reply:
                    label = ui.label("...").classes("whitespace-pre-wrap")
            answer = ""
            try:
                async with contextlib.aclosing(service.worker.answer(jobs)) as pieces:
                    async for _, piece in pieces:
                        answer += piece.text
                        label.text = _plain(answer)
                        if self.halted:
                            break
            except ApiError:
                bubble.delete()
                reply.delete()
                raise
        finally:
            service.worker.free_slots(1)
        self.turns = [*turns, Turn("assistant", without_control_tokens(answer) or " ")]
        self.images = list(images)
        self._empty_entry()
        if not answer.strip():
            label.text = "(an empty answer)"
        # An answer speaks of the picture that was shown last.
        drawn = await asyncio.to_thread(_drawn, self.images[-1], answer) if self.images else None
        if drawn is not None:
            with reply:
                ui.image(drawn).classes("w-96").props('alt="The last picture with the answer\'s boxes"')
        ui.run_javascript("window.scrollTo(0, document.body.scrollHeight)")


def _complain(text: str) -> None:
    """Show an error, long enough to be read."""
    ui.notify(text, type="negative", multi_line=True, timeout=10_000, close_button="Close")


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
