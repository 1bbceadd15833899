"""A conversation as token ids and labels, as the tokenizer's template writes it (``megavlm.data.template``)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from megavlm.config.errors import UserError
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.media import ImageRuns
from megavlm.data.schema import (
    FILM_PLACEHOLDER,
    IMAGE_PLACEHOLDER,
    VISUAL,
    Conversation,
    Turn,
    check_text,
    check_unicode,
    shown_films,
)
from megavlm.data.template import TEXT, Span
from megavlm.data.tokenizer import Tokenizer

_SLICES = re.compile(rf"{re.escape(IMAGE_PLACEHOLDER)}(?:\s*<slice>(?:{re.escape(IMAGE_PLACEHOLDER)}|\s)*</slice>)+")
"""A picture and its slices, each of which is marked as a picture."""


@dataclass(frozen=True)
class EncodedSample:
    """A conversation as the model sees it, T positions."""

    tokens: NDArray[np.int64]
    """[T] token ids."""
    labels: NDArray[np.int64]
    """[T] the position's own token where it is trained on, else IGNORE_INDEX; not shifted."""
    num_images: int
    """Images and films whose slots are in ``tokens``."""
    weights: NDArray[np.float32] | None = None
    """[T] what the loss of predicting each position's token is multiplied by; None for 1."""


def count_images(turns: Sequence[Turn]) -> int:
    """Return how many images turns show."""
    return sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, runs: Sequence[ImageRuns], system: str | None
) -> EncodedSample:
    """Encode a conversation for training.

    Args:
        conversation: A checked conversation.
        tokenizer: The tokenizer, with its template.
        runs: What stands for each image and film, in order of appearance; the template's marks come around an image.
        system: System turn for a conversation that has none; empty for none, None for the template's own.

    Raises:
        UserError: A text contains control tokens of this tokenizer, there are more or fewer images than ``runs``, or
            the template has no form for the conversation.
    """
    turns = _with_system(conversation.turns, tokenizer, system)
    tokens, labels, weights = _encode(tokenizer.template.spans(turns), tokenizer, _Images(turns, runs))
    weighted = None if set(weights) <= {1.0} else np.asarray(weights, np.float32)
    return EncodedSample(np.asarray(tokens, np.int64), np.asarray(labels, np.int64), len(runs), weighted)


def encode_prompt(
    turns: Sequence[Turn], tokenizer: Tokenizer, runs: Sequence[ImageRuns], system: str | None
) -> NDArray[np.int64]:
    """Encode turns for generation: they end with what leads to an answer.

    Args:
        turns: Earlier turns and the user's last one; images are :data:`IMAGE_PLACEHOLDER`.
        tokenizer: The tokenizer, with its template.
        runs: What stands for each image and film.
        system: System turn where ``turns`` have none; empty for none, None for the template's own.

    Returns:
        [T] token ids.

    Raises:
        UserError: There are no turns, the last is not the user's, a text contains control tokens, or there are more or
            fewer images than ``runs``.
    """
    if not turns or turns[-1].role != "user":
        raise UserError("a prompt must end with a user turn")
    turns = _with_system(turns, tokenizer, system)
    for turn in turns:
        check_text(turn.text, f"the {turn.role} turn")
    tokens, _, _ = _encode(tokenizer.template.spans(turns, prompt=True), tokenizer, _Images(turns, runs))
    return np.asarray(tokens, np.int64)


def encode_text(text: str, tokenizer: Tokenizer, runs: Sequence[ImageRuns]) -> list[int]:
    """Token ids of plain text; each :data:`IMAGE_PLACEHOLDER` becomes an image with the template's marks around it.

    Raises:
        UserError: The text contains a control token of this tokenizer, by whatever name the file calls it; or is not
            Unicode, on which tokenizers disagree: one raises, one writes other characters; or shows more or fewer
            images than ``runs``.
    """
    return _encode([Span(text, markup=False)], tokenizer, _Images([Turn("user", text)], runs))[0]


def last_question(prompt: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text of the user's last turn in a prompt that :func:`encode_prompt` made, images as placeholders."""
    template = tokenizer.template
    ids = [int(i) for i in prompt]
    if template.joined:
        return template.question(_shown(ids, tokenizer))
    before, lead = (
        _ids_of(pieces, tokenizer) for pieces in (template.user[: template.user.index(TEXT)], template.lead)
    )
    if before:
        start = max(at for at in range(len(ids)) if ids[at : at + len(before)] == before) + len(before)
    else:  # nothing but the beginning, and pictures, where these stand first
        slots = [at for at, token in enumerate(ids) if token == tokenizer.imgpad_id and template.images_first]
        start = max(len(_ids_of(template.begin, tokenizer)), *(at + 1 for at in slots[-1:]), 0)
    turn = ids[start : len(ids) - len(lead)]
    behind = _ids_of(template.user[template.user.index(TEXT) + 1 :][:1], tokenizer)
    return _shown(turn[: turn.index(behind[0])] if behind and behind[0] in turn else turn, tokenizer)


def _shown(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of ids, with each image as a placeholder."""
    begin, end = (tokenizer.ids.get(mark.strip()) for mark in tokenizer.template.image)
    parts: list[list[int]] = [[]]
    inside = False
    for i, before in zip(ids, [None, *ids], strict=False):
        # Where nothing marks an image, a run of slots is one.
        opens = i == begin if begin is not None else i == tokenizer.imgpad_id and before != tokenizer.imgpad_id
        if opens:
            parts.append([])
        inside = (inside or opens) and i != end and begin is not None
        if not inside and i not in (tokenizer.imgpad_id, end):
            parts[-1].append(i)
    text = IMAGE_PLACEHOLDER.join(tokenizer.decode(part) for part in parts)
    if begin is None and any(tokenizer.template.image):  # marks of words, around which a tokenizer may put spaces
        opening, closing = (re.escape(mark) for mark in tokenizer.template.image)
        text = re.sub(rf"{opening} ?{re.escape(IMAGE_PLACEHOLDER)} ?{closing}", IMAGE_PLACEHOLDER, text)
    return _SLICES.sub(IMAGE_PLACEHOLDER, text)


def answer_start(tokens: NDArray[np.int64], labels: NDArray[np.int64], tokenizer: Tokenizer) -> int | None:
    """Return where the first answer of an encoded conversation begins.

    Args:
        tokens: [T] token ids.
        labels: [T] labels; not looked at where the template trains more than answers.
        tokenizer: The tokenizer, with its template.

    Returns:
        Position of the answer's first token, or None where there is no answer.
    """
    if tokenizer.template.trains_answers_only:
        counted = np.flatnonzero(labels != IGNORE_INDEX)
        return int(counted[0]) if len(counted) else None
    lead = np.asarray(_ids_of(tokenizer.template.lead, tokenizer), np.int64)
    if len(tokens) < len(lead):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(lead))
    hits = np.flatnonzero((windows == lead).all(-1))
    return int(hits[0]) + len(lead) if len(hits) else None


class _Images:
    """The images and films of a conversation, taken one by one.

    Raises:
        UserError: there are more or fewer than ``runs``.
    """

    def __init__(self, turns: Sequence[Turn], runs: Sequence[ImageRuns]) -> None:
        films = shown_films(turns)
        if len(films) != len(runs):
            what = "image(s) and film(s)" if any(films) else "image(s)"
            raise UserError(f"the conversation shows {len(films)} {what}, {len(runs)} are given")
        self._runs = iter(runs)

    def next(self) -> ImageRuns:
        return next(self._runs)


def _with_system(turns: Sequence[Turn], tokenizer: Tokenizer, system: str | None) -> list[Turn]:
    """Return the turns as the template has them: with its system turn, and its form of pictures without a place.

    Raises:
        UserError: a text contains control tokens, and the template could not tell later.
    """
    template = tokenizer.template
    text = template.default_system if system is None else system
    turns = [replace(turn, text=template.placed(turn.text)) for turn in turns]
    if text and (not turns or turns[0].role != "system"):
        turns = [Turn("system", text), *turns]
    for turn in turns if template.renders else ():
        check_unicode(turn.text)
        parts = VISUAL.split(turn.text)
        for part in (*parts, "".join(parts)):
            _checked(part, tokenizer)
    return turns


def _encode(spans: Sequence[Span], tokenizer: Tokenizer, images: _Images) -> tuple[list[int], list[int], list[float]]:
    """Return ids, labels and weights. What weighs nothing has no label, and the tokens that it has else."""
    tokens: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    encode = _joined if tokenizer.template.joined else _apart
    ends = tokenizer.ids.get(tokenizer.template.ends)
    answered = 0.0
    for ids, weight in encode(spans, tokenizer, images):
        if not ids:
            continue
        tokens += ids
        labels += ids if weight else [IGNORE_INDEX] * len(ids)
        weights += [weight or 1.0] * len(ids)
        if answered and not weight and ends is not None:
            labels[-len(ids)], weights[-len(ids)] = ends, answered
        answered = weight
    return tokens, labels, weights


def _counted(span: Span) -> float:
    """Return the weight of a span, 0 where it is not trained on."""
    return span.weight if span.trained else 0.0


def _apart(spans: Sequence[Span], tokenizer: Tokenizer, images: _Images) -> Iterator[tuple[list[int], float]]:
    """Yield each span's ids and weight, encoded by itself, so that the mask cuts between tokens."""
    for span in spans:
        if span.markup and VISUAL.search(span.text) is None:
            yield _ids_of([span.text], tokenizer), _counted(span)
            continue
        check_unicode(span.text)
        ids: list[int] = []
        for part in _parts(span.text):
            if part in (IMAGE_PLACEHOLDER, FILM_PLACEHOLDER):
                ids += _image(images.next(), tokenizer, film=part == FILM_PLACEHOLDER)
            else:
                ids += _checked(part, tokenizer)
        yield ids, _counted(span)


def _joined(spans: Sequence[Span], tokenizer: Tokenizer, images: _Images) -> Iterator[tuple[list[int], float]]:
    """Yield ids and weight of stretches in which that is the same, of the whole conversation encoded as one string.

    Where the mask changes within what would be one token, the text is cut there and encoded on from the cut: a prompt
    is then what the training sequence begins with, whatever the answer. A rendered text is cut nowhere, so that its ids
    are Transformers'; such a token belongs to what it leads to.
    """
    stretches = list(_stretches(spans, tokenizer, images))
    if tokenizer.template.renders:
        whole = tokenizer.encode("".join(text for text, _, _ in stretches))
        text, at = "", 0
        for one, runs, weight in stretches:
            text += one
            end = max(at, _common(tokenizer.encode(text), whole))  # no id twice, whatever a tokenizer makes of a prefix
            yield _filled(whole[at:end], runs, tokenizer), weight
            at = end
        return
    before = ""
    known: list[int] = []
    for text, runs, weight in stretches:
        whole = tokenizer.encode(before + text)
        if whole[: len(known)] == known:
            new, before, known = whole[len(known) :], before + text, whole
        else:
            before, known = text, tokenizer.encode(text)
            new = known
        yield _filled(new, runs, tokenizer), weight


def _stretches(
    spans: Sequence[Span], tokenizer: Tokenizer, images: _Images
) -> Iterator[tuple[str, list[ImageRuns], float]]:
    """Yield text, images and weight of stretches in which that does not change; a run of slots is one token.

    An answer of weight 0 is a stretch too: its tokens are those that it has else.
    """
    for (trained, weight), group in groupby(spans, lambda span: (span.trained, span.weight)):
        text = ""
        runs: list[ImageRuns] = []
        for span in group:
            if not span.markup:
                check_unicode(span.text)
            for part in _parts(span.text):
                if part in (IMAGE_PLACEHOLDER, FILM_PLACEHOLDER):
                    runs.append(images.next())
                    text += _written(runs[-1], tokenizer, film=part == FILM_PLACEHOLDER)
                    continue
                if not span.markup:
                    _checked(part, tokenizer)
                text += part if not span.markup else _named(part, tokenizer)
        if text:
            yield text, runs, weight if trained else 0.0


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two sequences begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _parts(text: str) -> list[str]:
    """Return a text in parts: what shows an image or film is one by itself."""
    found: list[str] = []
    at = 0
    for one in VISUAL.finditer(text):
        found += [text[at : one.start()], one[0]]
        at = one.end()
    return [*found, text[at:]]


def _written(runs: ImageRuns, tokenizer: Tokenizer, *, film: bool) -> str:
    """Return an image or film as text, with one token for each run of slots."""
    begin, end = (_named(mark, tokenizer) for mark in _marks(runs, tokenizer, film=film))
    slot = tokenizer.spelled[tokenizer.template.slot.name]
    return begin + "".join(run if isinstance(run, str) else slot if run else "" for run in runs) + end


def _marks(runs: ImageRuns, tokenizer: Tokenizer, *, film: bool) -> tuple[str, str]:
    """Return what stands around an image: nothing where its plan wrote them itself, as those of slices and films do."""
    if film:
        return "", ""
    marks = tokenizer.template.image
    written = bool(runs) and isinstance(runs[0], str) and bool(marks[0]) and runs[0].startswith(marks[0])
    return ("", "") if written else marks


def _named(piece: str, tokenizer: Tokenizer) -> str:
    """Return markup as the tokenizer calls it."""
    return tokenizer.spelled.get(piece, piece)


def _filled(ids: Sequence[int], runs: Sequence[ImageRuns], tokenizer: Tokenizer) -> list[int]:
    """Return ids with each image's slots in the place of its runs.

    Raises:
        UserError: a text made slots of its own.
    """
    lengths = [run for one in runs for run in one if isinstance(run, int) and run]
    if ids.count(tokenizer.imgpad_id) != len(lengths):
        raise UserError(f"text contains the control token {tokenizer.decode([tokenizer.imgpad_id])}")
    left = iter(lengths)
    return [i for token in ids for i in ([token] * next(left) if token == tokenizer.imgpad_id else [token])]


def _checked(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of text that others wrote.

    Raises:
        UserError: there is a control token among them.
    """
    ids = tokenizer.encode(text) if text else []
    # Looked for among the ids: names differ between tokenizers, and some normalise the text first.
    forged = tokenizer.control_ids.intersection(ids)
    if forged:
        raise UserError(f"text contains the control token {tokenizer.decode([min(forged)])}")
    return ids


def _image(runs: ImageRuns, tokenizer: Tokenizer, *, film: bool) -> list[int]:
    """Return the ids of an image or film, the marks around it included."""
    begin, end = _marks(runs, tokenizer, film=film)
    ids = _ids_of([begin], tokenizer)
    for run in runs:
        ids += _ids_of([run], tokenizer) if isinstance(run, str) else [tokenizer.imgpad_id] * run
    return ids + _ids_of([end], tokenizer)


def _ids_of(pieces: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of markup, encoded piece by piece."""
    ids: list[int] = []
    for piece in pieces:
        known = tokenizer.ids.get(piece)
        ids += [known] if known is not None else tokenizer.encode_markup(piece) if piece else []
    return ids
