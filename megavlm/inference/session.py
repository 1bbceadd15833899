"""A loaded checkpoint that answers conversations, at this job's layout.

Rank 0 asks, and every rank of the job takes part in the answer: :meth:`Session.answers` is a collective, and what rank
0 passes is handed to the others. A job that talks has one data-parallel replica, or those that
share out experts, which answer alike.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megavlm.config.errors import RecipeError, UserError
from megavlm.config.experts import experts_span_replicas
from megavlm.config.schema import Recipe
from megavlm.data.chat import encode_prompt
from megavlm.data.decoders import make_decoder
from megavlm.data.images import image_grids, image_runs
from megavlm.data.media import Arrangement, plan_of
from megavlm.data.schema import Turn, shown_films
from megavlm.data.tokenizer import Tokenizer
from megavlm.inference.answer_text import AnswerText
from megavlm.inference.generate import Chosen, generating
from megavlm.inference.loaded import loaded
from megavlm.inference.prompt import Prompt
from megavlm.inference.sampling import NO_TOKEN, Sampling
from megavlm.inference.turns import Visual, without_control_tokens
from megavlm.parallel.device import local_device
from megavlm.parallel.state import agreed, any_rank_of, is_first_stage, is_lost_peer

logger = logging.getLogger(__name__)

_ASK_EVERY = 8
"""Tokens after which several ranks agree on what nobody waits for any more."""


@dataclass(frozen=True)
class Asked:
    """A conversation that waits for an answer."""

    turns: tuple[Turn, ...]
    """Up to the user's last turn; images are :data:`IMAGE_PLACEHOLDER`, films :data:`FILM_PLACEHOLDER`."""
    images: tuple[Visual, ...] = ()
    """The image files and films, in the order of their placeholders."""
    tokens: NDArray[np.int64] | None = field(default=None, compare=False)
    """[T] token ids, where they are known: :meth:`Session.encoded`."""

    def __post_init__(self) -> None:
        """Check that images, films and placeholders match.

        Raises:
            UserError: they do not.
        """
        places = shown_films(self.turns)
        if places != [not isinstance(one, bytes) for one in self.images]:
            what = "image(s) and film(s)" if any(places) else "image(s)"
            raise UserError(f"the prompt shows {len(places)} {what}, {len(self.images)} are given")


_Views = tuple[torch.Tensor | None, Arrangement | None]
"""[V, 3, H, W] uint8 views of a conversation's images, and where their features go."""


class NotFiniteError(UserError):
    """The model's logits are NaN or infinite."""


@dataclass(frozen=True)
class TokenReport:
    """A token of an answer as ``Sampling.report`` wants it, and those that could have stood there."""

    text: str
    """Its text; with U+FFFD where it is a part of a character."""
    log_probability: float
    """Natural logarithm of the model's own probability."""
    best: tuple[tuple[str, float], ...] = ()
    """The best tokens' texts and log probabilities."""


@dataclass(frozen=True)
class Piece:
    """What a step added to an answer."""

    text: str
    """New text; may be empty while a character is incomplete."""
    tokens: int
    """Tokens of the answer so far."""
    finish: str | None = None
    """With the last piece: ``stop`` (the model ended the answer), ``length`` or ``error``."""
    error: Exception | None = None
    """With ``error``: why. A ``UserError`` is about the conversation, or a :class:`NotFiniteError`."""
    report: TokenReport | None = None
    """What the sampling wants to be told of the token; not of one that ends the answer."""
    token: int | None = None
    """The token's id, but of one that ends the answer."""


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
        self.plan = plan_of(recipe.model)
        self._decoder = (
            make_decoder(recipe.data.image_decoder, alpha=recipe.data.image_alpha) if is_first_stage() else None
        )
        self.idle_seconds = min(20.0, 20.0 * recipe.parallel.distributed_timeout_minutes)
        """With nothing to ask for so long, call :meth:`keep_waiting`: a third of what the other ranks wait, at most."""

    @functools.cached_property
    def control_names(self) -> frozenset[str]:
        """What the tokenizer calls its control tokens."""
        return frozenset(self.tokenizer.decode([token]) for token in self.tokenizer.control_ids) - {""}

    def encoded(self, asked: Asked) -> Asked:
        """Return a conversation with its tokens.

        Answers in it are taken whatever they hold: a poor model may have written control tokens, which are left out.

        Raises:
            UserError: another text holds control tokens, or is not Unicode.
        """
        if asked.tokens is not None:
            return asked
        turns = [
            Turn(turn.role, without_control_tokens(turn.text, self.control_names) or " ")
            if turn.role == "assistant" and any(name in turn.text for name in self.control_names)
            else turn
            for turn in asked.turns
        ]
        runs = image_runs(self.plan, len(asked.images), lambda: asked.images)
        tokens = encode_prompt(turns, self.tokenizer, runs, self.recipe.data.system_message)
        return replace(asked, tokens=tokens)

    def cut(self, asked: Asked, max_new_tokens: int) -> tuple[Asked, Any]:
        """Return the conversation without the oldest exchanges that do not fit the context, and its [T] tokens.

        Raises:
            UserError: the last turn alone does not fit, or a text holds control tokens.
        """
        while True:
            asked = self.encoded(asked)
            tokens = asked.tokens
            assert tokens is not None
            if len(tokens) + max_new_tokens <= self.context:
                return asked, tokens
            first = 1 if asked.turns[0].role == "system" else 0
            nexts = [i for i in range(first + 1, len(asked.turns)) if asked.turns[i].role == "user"]
            if not nexts:
                raise UserError(
                    f"prompt and answer ({max_new_tokens} tokens) take {len(tokens) + max_new_tokens} positions, "
                    f"the context has {self.context}; shorten it, lower max_new_tokens, or raise the context"
                )
            dropped = len(shown_films(asked.turns[: nexts[0]]))
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
            What was added, by the conversation's index. One that cannot be answered, as its text or one of its images
            is unusable, or the model's logits for it are not finite, gets a last piece with the error; the others are
            answered as if it were not there.
        """
        with agreed("reading the prompts"):
            box = [self._asked(asked or (), max_new_tokens, sampling) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box, 0)
        assert box[0] is not None
        given = box[0]
        failed: dict[int, Exception] = {
            i: UserError(reason) if theirs else RuntimeError(reason) for i, (theirs, reason) in given.refused.items()
        }
        images, broken = self._decoded([one[0] for one in given.shown])
        prompts: dict[int, Prompt] = {}
        for i, place in given.places.items():
            if place in broken:
                failed[i] = broken[place]
            else:
                files, tokens = given.shown[place]
                grids = image_grids(self.recipe.model, len(files), functools.partial(tuple, files))
                prompts[i] = Prompt(tokens, *images[place], grids)
        if failed:
            yield {i: Piece("", 0, "error", error) for i, error in failed.items()}
        live = list(prompts)
        where = {i: place for place, i in enumerate(live)}
        stop = frozenset(self.tokenizer.stop_ids)
        texts = {i: AnswerText(self.tokenizer) for i in live}
        for found in generating(
            self.chunks, list(prompts.values()), max_new_tokens=[given.most[i] for i in live], stop_ids=list(stop),
            vocab_size=self.tokenizer.vocab_size, pack_length=self.context,
            sampling=[given.sampling[i] for i in live],
            dropped=_shared(lambda: {where[i] for i in dropped() if i in where}, len(live)),
        ):  # fmt: skip
            news = {live[place]: chosen for place, chosen in found.items()}
            yield {
                i: self._piece(prompts[i], one, one.token in stop, given.most[i], texts[i]) for i, one in news.items()
            }

    def ask(self, asked: Asked, *, max_new_tokens: int, sampling: Sampling) -> Iterator[Piece]:
        """Answer one conversation, on rank 0, while the others :meth:`follow`.

        Raises:
            UserError: it cannot be answered.
        """
        yield from _only(self.ask_all([asked], max_new_tokens=max_new_tokens, sampling=sampling))

    def answer(self, asked: Asked, *, max_new_tokens: int, sampling: Sampling) -> Iterator[Piece]:
        """Answer one conversation; a collective over the job, which all ranks call alike.

        Raises:
            UserError: it cannot be answered.
        """
        yield from _only(self.answers([asked], max_new_tokens=max_new_tokens, sampling=sampling))

    def ask_all(
        self,
        asked: Sequence[Asked],
        *,
        max_new_tokens: int | Sequence[int],
        sampling: Sampling | Sequence[Sampling],
        dropped: Callable[[], Collection[int]] = frozenset,
    ) -> Iterator[dict[int, Piece]]:
        """Answer several conversations at once as :meth:`answers`, on rank 0, while the others :meth:`follow`."""
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

    def _asked(
        self, asked: Sequence[Asked], max_new_tokens: int | Sequence[int], sampling: Sampling | Sequence[Sampling]
    ) -> _Given:
        """Return what rank 0 hands to the others; a conversation that stands there several times goes once."""
        most = [max_new_tokens] * len(asked) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        kinds = (
            [replace(sampling, seed=sampling.seed + i) for i in range(len(asked))]
            if isinstance(sampling, Sampling)
            else list(sampling)
        )
        given = _Given([], {}, {}, most, kinds)
        known: dict[tuple[int, int], int] = {}
        for i, (one, new) in enumerate(zip(asked, most, strict=True)):
            try:
                if (id(one), new) not in known:
                    fitted, tokens = self.cut(one, new)
                    known[id(one), new] = len(given.shown)
                    given.shown.append((fitted.images, tokens))
                given.places[i] = known[id(one), new]
            except Exception as error:  # of this conversation, and of no other
                theirs = isinstance(error, UserError)
                if not theirs:
                    logger.exception("a conversation cannot be read")
                given.refused[i] = theirs, str(error) if theirs else f"{type(error).__name__}: {error}"
        return given

    def _decoded(self, shown: Sequence[Sequence[Visual]]) -> tuple[list[_Views], dict[int, Exception]]:
        """Decode the images of each conversation, on the ranks of the first stage.

        Returns:
            For each the views of its images and where their features go (None on later stages), and the errors of
            those that cannot be decoded on some rank, which all ranks know.
        """
        images: list[_Views] = [(None, None)] * len(shown)
        errors: dict[int, Exception] = {}
        if self._decoder is not None:
            for place, files in enumerate(shown):
                try:
                    decoded, arrangement = self._decoder.decode_prompt(files, self.plan)
                    if decoded.failed:
                        what = "image" if isinstance(files[decoded.failed[0]], bytes) else "film"
                        cause = f"{what} {decoded.failed[0] + 1} cannot be decoded: {decoded.causes[0]}"
                        errors[place] = UserError(cause)
                    images[place] = decoded.pixels, arrangement
                except UserError as error:
                    errors[place] = error
                except Exception as error:  # of these images, and of no others
                    logger.exception("a conversation's images cannot be decoded")
                    errors[place] = error
        votes = any_rank_of([place in errors for place in range(len(shown))]) if shown else []
        unknown = RuntimeError("an image cannot be decoded on another rank; its message says why")
        return images, {place: errors.get(place, unknown) for place, vote in enumerate(votes) if vote}

    def _piece(self, prompt: Prompt, chosen: Chosen, ended: bool, max_new_tokens: int, text: AnswerText) -> Piece:
        """Return what a token adds."""
        if chosen.token == NO_TOKEN:
            error = NotFiniteError(
                "the model's logits are NaN or infinite: its weights are damaged, or too large for this precision"
            )
            return Piece("", len(prompt.answer), "error", error)
        if ended:
            return Piece(text.rest(), len(prompt.answer), "stop")
        report = None
        if chosen.log_probability is not None:
            best = tuple((text.would_add(token), value) for token, value in chosen.best)
            report = TokenReport(text.would_add(chosen.token), chosen.log_probability, best)
        new = text.add(chosen.token)
        if len(prompt.answer) < max_new_tokens:
            return Piece(new, len(prompt.answer), report=report, token=chosen.token)
        return Piece(new + text.rest(), len(prompt.answer), "length", report=report, token=chosen.token)


@dataclass
class _Given:
    """What rank 0 was asked, as all ranks get it."""

    shown: list[tuple[tuple[Visual, ...], NDArray[np.int64]]]
    """Image files and tokens of the conversations that can be read."""
    places: dict[int, int]
    """By the index of a conversation, where it stands in ``shown``."""
    refused: dict[int, tuple[bool, str]]
    """By the index of a conversation, whether it is to blame that it cannot be read, and why."""
    most: list[int]
    """Longest answer to each."""
    sampling: list[Sampling]
    """How tokens are chosen for each."""


def _only(answers: Iterator[dict[int, Piece]]) -> Iterator[Piece]:
    """Yield the pieces of the only conversation.

    Raises:
        UserError: it cannot be answered; after the last collective of its answer, so that no rank waits.
    """
    error = None
    for pieces in answers:
        error = pieces[0].error
        if error is None:
            yield pieces[0]
    if error is not None:
        raise error


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
        RecipeError: the job has more ranks than one data-parallel replica, or than those that share out experts.
    """
    longest = recipe.model.language.max_position_embeddings
    ranks, parallel = int(os.environ.get("WORLD_SIZE", "1")), recipe.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    what, needed = "TP x PP is", tensor * stages
    if experts_span_replicas(parallel):  # all of which answer the same
        shared = parallel.expert_model_parallel_size * parallel.expert_tensor_ranks
        what, needed = "replicas that share out experts have", math.lcm(tensor, shared) * stages
    if ranks != needed:
        raise RecipeError(
            f"parallel: {what} {needed} ranks, and {ranks} processes were started; answering has no more: start "
            f"{needed}, or set parallel.tensor_model_parallel_size"
        )
    with loaded(recipe, checkpoint, tokenizer) as chunks:
        yield Session(recipe, tokenizer, chunks, context or longest)
