"""A loaded checkpoint that answers conversations, at this job's layout.

Rank 0 asks, and every rank of the job takes part in the answer: :meth:`Session.answers` is a collective, and what rank
0 passes is handed to the others. A job that talks has one data-parallel replica.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavlm.config.errors import RecipeError
from megavlm.config.schema import Recipe
from megavlm.data.chat import encode_prompt
from megavlm.data.decode import make_decoder
from megavlm.data.schema import IMAGE_PLACEHOLDER, Turn
from megavlm.data.tokenizer import Tokenizer
from megavlm.inference.generate import generating
from megavlm.inference.loaded import loaded
from megavlm.inference.prompt import Prompt
from megavlm.inference.sampling import Sampling
from megavlm.parallel.device import local_device
from megavlm.parallel.state import agreed, is_first_stage, is_lost_peer

_BROKEN = "\ufffd"
_ASK_EVERY = 8
"""Tokens after which several ranks agree on what nobody waits for any more."""


@dataclass(frozen=True)
class Asked:
    """A conversation that waits for an answer."""

    turns: tuple[Turn, ...]
    """Up to the user's last turn; images are :data:`IMAGE_PLACEHOLDER`."""
    images: tuple[bytes, ...] = ()
    """The image files, in the order of their placeholders."""

    def __post_init__(self) -> None:
        """Check that images and placeholders match.

        Raises:
            ValueError: they do not.
        """
        places = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in self.turns)
        if places != len(self.images):
            raise ValueError(f"the prompt shows {places} image(s), {len(self.images)} are given")


@dataclass(frozen=True)
class Piece:
    """What a step added to an answer."""

    text: str
    """New text; may be empty while a character is incomplete."""
    tokens: int
    """Tokens of the answer so far."""
    finish: str | None = None
    """With the last piece: ``stop`` (the model ended the answer) or ``length``."""


class Session:
    """A model that answers.

    Args:
        recipe: of the checkpoint, at this job's layout.
        tokenizer: its tokenizer.
        chunks: the model chunks of this rank, with weights.
        context: longest prompt with its answer, in tokens.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, chunks: Sequence[Any], context: int) -> None:
        self.recipe, self.tokenizer, self.chunks, self.context = recipe, tokenizer, chunks, context
        self._decoder = (
            make_decoder(recipe.data.image_decoder, alpha=recipe.data.image_alpha) if is_first_stage() else None
        )
        self.idle_seconds = min(20.0, 20.0 * recipe.parallel.distributed_timeout_minutes)
        """With nothing to ask for so long, call :meth:`keep_waiting`: a third of what the other ranks wait, at most."""

    def cut(self, asked: Asked, max_new_tokens: int) -> tuple[Asked, Any]:
        """Return the conversation without the oldest exchanges that do not fit the context, and its [T] tokens.

        Raises:
            ValueError: the last turn alone does not fit, or a text holds control tokens.
        """
        while True:
            tokens = encode_prompt(
                asked.turns, self.tokenizer, self.recipe.model.tokens_per_image, self.recipe.data.system_message
            )
            if len(tokens) + max_new_tokens <= self.context:
                return asked, tokens
            first = 1 if asked.turns[0].role == "system" else 0
            nexts = [i for i in range(first + 1, len(asked.turns)) if asked.turns[i].role == "user"]
            if not nexts:
                raise ValueError(
                    f"prompt and answer ({max_new_tokens} tokens) take {len(tokens) + max_new_tokens} positions, "
                    f"the context has {self.context}; shorten it, lower max_new_tokens, or raise the context"
                )
            dropped = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in asked.turns[: nexts[0]])
            asked = Asked((*asked.turns[:first], *asked.turns[nexts[0] :]), asked.images[dropped:])

    def answers(
        self,
        asked: Sequence[Asked] | None,
        *,
        max_new_tokens: int | Sequence[int],
        sampling: Sampling | Sequence[Sampling],
        dropped: Callable[[], Collection[int]] = frozenset,
    ) -> Iterator[dict[int, Piece]]:
        """Answer conversations, and yield as text comes; a collective over the job.

        Args:
            asked: on rank 0, the conversations; elsewhere not looked at.
            max_new_tokens: longest answer, of all or of each; rank 0's.
            sampling: how tokens are chosen, for all or for each; rank 0's.
            dropped: on rank 0, which conversations need no more text, as indices; asked now and then.

        Yields:
            What was added, by the conversation's index.

        Raises:
            ValueError: an image cannot be decoded or a prompt does not fit; on all ranks, before any work.
        """
        with agreed("reading the prompts"):
            mine = list(asked or ()) if dist.get_rank() == 0 else []
            most = [max_new_tokens] * len(mine) if isinstance(max_new_tokens, int) else list(max_new_tokens)
            fitted = [self.cut(one, new) for one, new in zip(mine, most, strict=True)] if mine else []
        box: list[Any] = [([(one.images, tokens) for one, tokens in fitted], most, sampling)]
        dist.broadcast_object_list(box, 0)
        shown, most, sampling = box[0]
        prompts = [Prompt(tokens) for _, tokens in shown]
        with agreed("reading images"):
            for prompt, (images, _) in zip(prompts, shown, strict=True):
                self._show(prompt, images)
        stop = frozenset({self.tokenizer.im_end_id, self.tokenizer.eos_id})
        said = [""] * len(prompts)
        for tokens in generating(
            self.chunks, prompts, max_new_tokens=most, stop_ids=list(stop), vocab_size=self.tokenizer.vocab_size,
            pack_length=self.context, sampling=sampling, dropped=_shared(dropped, len(prompts)),
        ):  # fmt: skip
            yield {i: self._piece(prompts[i], token in stop, most[i], said, i) for i, token in tokens.items()}

    def ask(self, asked: Asked, *, max_new_tokens: int, sampling: Sampling) -> Iterator[Piece]:
        """Answer one conversation, on rank 0, while the others :meth:`follow`.

        Raises:
            ValueError: as :meth:`answers`.
        """
        for pieces in self.ask_all([asked], max_new_tokens=max_new_tokens, sampling=sampling):
            yield pieces[0]

    def ask_all(
        self,
        asked: Sequence[Asked],
        *,
        max_new_tokens: int | Sequence[int],
        sampling: Sampling | Sequence[Sampling],
        dropped: Callable[[], Collection[int]] = frozenset,
    ) -> Iterator[dict[int, Piece]]:
        """Answer several conversations at once, on rank 0, while the others :meth:`follow`.

        Raises:
            ValueError: as :meth:`answers`.
        """
        self._call("ask")
        yield from self.answers(asked, max_new_tokens=max_new_tokens, sampling=sampling, dropped=dropped)

    def keep_waiting(self) -> None:
        """On rank 0 with nothing to ask: begin anew the time after which the other ranks' waiting is an error."""
        self._call("wait")

    def follow(self) -> None:
        """Take part in rank 0's answers, on the other ranks, until it leaves."""
        while (command := self._call(None)) != "leave":
            if command == "wait":
                continue
            try:
                for _ in self.answers(None, max_new_tokens=1, sampling=Sampling()):
                    pass
            except (ValueError, RuntimeError) as error:
                if is_lost_peer(error):
                    raise

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """On rank 0: at the end of the block the other ranks may leave."""
        try:
            yield
        finally:
            self._call("leave")

    @staticmethod
    def _call(command: str | None) -> str:
        """Hand a command from rank 0 to the others."""
        box = [command]
        dist.broadcast_object_list(box, 0)
        assert box[0] is not None
        return box[0]

    def _piece(self, prompt: Prompt, ended: bool, max_new_tokens: int, said: list[str], index: int) -> Piece:
        """Return the text that is new, without a character that is not whole yet."""
        finish = "stop" if ended else "length" if len(prompt.answer) == max_new_tokens else None
        text = self.tokenizer.decode(prompt.answer)
        if finish is None:
            text = text.rstrip(_BROKEN)
        new = text[len(said[index]) :] if text.startswith(said[index]) else ""
        said[index] += new
        return Piece(new, len(prompt.answer), finish)

    def _show(self, prompt: Prompt, images: Sequence[bytes]) -> None:
        """Decode a prompt's images, on the ranks of the first stage.

        Raises:
            ValueError: one cannot be decoded.
        """
        if self._decoder is None:
            return
        decoded = self._decoder.decode(images, self.recipe.model.vision.image_size)
        if decoded.failed:
            raise ValueError(f"image {decoded.failed[0] + 1} cannot be decoded: {decoded.causes[0]}")
        prompt.images = decoded.pixels


def _shared(dropped: Callable[[], Collection[int]], count: int) -> Callable[[], Collection[int]]:
    """Return ``dropped`` of rank 0 as all ranks see it; asked every few tokens only where that is a broadcast."""
    if dist.get_world_size() == 1:
        return dropped
    calls = itertools.count(1)

    def agreed_on() -> Collection[int]:
        if next(calls) % _ASK_EVERY:
            return ()
        flags = torch.zeros(count, dtype=torch.uint8, device=local_device())
        if dist.get_rank() == 0:
            flags[list(dropped())] = 1
        dist.broadcast(flags, 0)
        return set(flags.nonzero()[:, 0].tolist())

    return agreed_on


@contextlib.contextmanager
def session(recipe: Recipe, checkpoint: Path, tokenizer: Tokenizer, context: int | None = None) -> Iterator[Session]:
    """Load a checkpoint and yield what answers with it; process groups end with the block.

    Args:
        recipe: of the checkpoint, at this job's layout; checked.
        checkpoint: its directory.
        tokenizer: its tokenizer.
        context: longest prompt with its answer; None for the model's ``max_position_embeddings``.

    Raises:
        RecipeError: the layout has more than one data-parallel replica.
    """
    longest = recipe.model.language.max_position_embeddings
    ranks, parallel = int(os.environ.get("WORLD_SIZE", "1")), recipe.parallel
    needed = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if ranks != needed:
        raise RecipeError(
            f"parallel: TP x PP is {needed}, and {ranks} processes were started; answering has one replica: start "
            f"{needed}, or set parallel.tensor_model_parallel_size"
        )
    with loaded(recipe, checkpoint, tokenizer) as chunks:
        yield Session(recipe, tokenizer, chunks, context or longest)
