"""``megavlm chat``: several turns and pictures at a terminal, boxes drawn."""

from __future__ import annotations

import argparse
import io
import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megavlm.config.errors import UserError
from megavlm.data.films.film import Film
from megavlm.data.schema import Turn
from megavlm.inference.checkpoint import add_model_arguments, add_sampling_arguments, model_of, sampling_of
from megavlm.inference.turns import (
    Visual,
    in_their_order,
    read_film,
    read_image,
    system_turns,
    user_turn,
    without_control_tokens,
    write_any_text,
)

if TYPE_CHECKING:
    from megavlm.data.box_space import BoxSpace
    from megavlm.inference.sampling import Sampling
    from megavlm.inference.session import Session

logger = logging.getLogger(__name__)

INTERMIXED = True
"""Overrides may stand between the options."""

HELP = (
    "Type a question. /image PATH shows a picture with the next one, /video PATH a film, /clear begins anew, /help, "
    "/quit."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Talk with a checkpoint. Pictures with the boxes of an answer are written to --out. The oldest exchanges are "
        "left out where a conversation outgrows the context."
    )
    add_model_arguments(parser)
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture for the first question")
    parser.add_argument(
        "--video", type=Path, action="append", default=[], help="a film for it, or a folder of its frames"
    )
    parser.add_argument("--system", help="system message (default: the recipe's)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/chat"), help="where pictures with boxes go (default ./runs/chat)"
    )
    add_sampling_arguments(parser, 512)


class Chat:
    """A conversation.

    Args:
        model: what answers; this is rank 0.
        sampling: how.
        max_new_tokens: longest answer.
        out: directory of the pictures with boxes.
        system: system message, or None for the recipe's.
        say: takes what is to be shown.
    """

    def __init__(
        self,
        model: Session,
        sampling: Sampling,
        max_new_tokens: int,
        out: Path,
        system: str | None,
        say: Callable[[str], object],
    ) -> None:
        self.model, self.sampling, self.max_new_tokens = model, sampling, max_new_tokens
        self.out, self.system, self.say = out, system, say
        self.waiting: list[bytes] = []
        """Pictures that go with the next question."""
        self.films: list[Film] = []
        """Films that go with it."""
        self.space: BoxSpace | None = None
        """Of ``draw_boxes``."""
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.turns: list[Turn] = list(system_turns(self.system))
        self.images: list[Visual] = []
        self.waiting.clear()
        self.films.clear()

    def take(self, line: str) -> bool:
        """Do what a line asks; False ends the conversation. What is wrong with the line is said, and costs nothing."""
        word, _, rest = line.strip().partition(" ")
        if not word:
            return True
        if word in ("/quit", "/exit"):
            return False
        try:
            if word == "/image":
                self.waiting.append(read_image(_path(rest.strip())))
                self.say(f"{len(self.waiting)} picture(s) wait for the next question\n")
            elif word == "/video":
                self.films.append(read_film(_path(rest.strip())))
                self.say(f"{len(self.films)} film(s) wait for the next question\n")
            elif word == "/clear":
                self.clear()
            elif word.startswith("/"):
                self.say(HELP + "\n")
            else:
                self.ask(line.strip())  # a newline at the end is no part of the question
        except UserError as error:
            self.say(f"{error}\n")
        except OSError as error:
            self.say(f"{error.filename}: {error.strerror}\n" if error.filename and error.strerror else f"{error}\n")
        return True

    def ask(self, text: str) -> str:
        """Ask, show the answer as it comes, and draw its boxes; returns the answer.

        Raises:
            UserError: the question does not fit its pictures or the context; the conversation stays as it was.
        """
        from megavlm.inference.session import Asked  # noqa: PLC0415 - imports Megatron-Core

        new = user_turn(text, len(self.waiting), len(self.films))
        turns = [*self.turns, new]
        images = [*self.images, *in_their_order([new], self.waiting, self.films)]
        answer = ""
        for piece in self.model.ask(
            Asked(tuple(turns), tuple(images)), max_new_tokens=self.max_new_tokens, sampling=self.sampling
        ):
            answer += piece.text
            self.say(piece.text)
        self.say("\n")
        self.turns = [*turns, Turn("assistant", without_control_tokens(answer) or " ")]
        self.images = images
        self.waiting.clear()
        self.films.clear()
        self._draw(answer)
        return answer

    def _draw(self, answer: str) -> None:
        from megavlm.inference.boxes import draw_boxes  # noqa: PLC0415

        # An answer speaks of the picture that was shown last.
        last = self.images[-1] if self.images else None
        picture = draw_boxes(last, answer, self.space) if isinstance(last, bytes) else None
        if picture is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            path = self.out / f"answer-{sum(turn.role == 'assistant' for turn in self.turns)}.png"
            picture.save(path)
            self.say(f"[{path}]\n")


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends.

    Raises:
        MissingFileError: checkpoint or image are missing.
        UserError: the recipe does not fit this job, or an image is broken.
    """
    sampling = sampling_of(args)
    system_turns(args.system)  # what is wrong with it is said before the model is loaded
    recipe, checkpoint, tokenizer = model_of(args)
    images, films = [read_image(path) for path in args.image], [read_film(path) for path in args.video]
    from megavlm.parallel.device import prepare_device  # noqa: PLC0415 - imports torch

    prepare_device()
    import torch.distributed as dist  # noqa: PLC0415

    from megavlm.inference.boxes import box_space, family_of  # noqa: PLC0415 - imports PIL
    from megavlm.inference.session import session  # noqa: PLC0415 - imports Megatron-Core

    with session(recipe, checkpoint, tokenizer, args.context) as model:
        if dist.get_rank() != 0:
            model.follow()
            return 0

        write_any_text(sys.stdout)

        def say(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        with model.leading():
            chat = Chat(model, sampling, args.max_new_tokens, args.out, args.system, say)
            chat.waiting += images
            chat.films += films
            chat.space = box_space(family_of(checkpoint), recipe.model)
            say(HELP + "\n")
            for line in _lines(say, model):
                if not chat.take(line):
                    break
    return 0


def _path(text: str) -> Path:
    """Return the path that was typed, also one whose name is not UTF-8.

    Raises:
        UserError: it is in the home directory of nobody.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: {error}") from None


def _lines(say: Callable[[str], object], model: Session) -> Iterator[str]:
    """Yield what is typed, until the input ends; the other ranks are kept waiting meanwhile."""
    if sys.stdin is None:  # closed by who started us
        return
    typed: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        try:
            while line := _read_line(sys.stdin):
                typed.put(line)
        except OSError as error:  # the terminal is gone
            logger.warning("the input cannot be read further: %s", error)
        finally:
            typed.put("")

    threading.Thread(target=read, name="megavlm-stdin", daemon=True).start()
    while True:
        if sys.stdin.isatty():
            say("> ")
        while (line := _next(typed, model.idle_seconds)) is None:
            model.keep_waiting()
        if not line:
            return
        yield line


def _read_line(stream: TextIO) -> str:
    """Return a line; bytes that are no text of the stream's encoding become surrogates, whatever its error handler is.

    A line with such bytes is refused as a question, which costs nothing, and may still name a file.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream.readline()
    return stream.buffer.readline().decode(stream.encoding, "surrogateescape")


def _next(typed: queue.SimpleQueue[str], seconds: float) -> str | None:
    """Return the next line, or None where none comes in time."""
    try:
        return typed.get(timeout=seconds)
    except queue.Empty:
        return None
