"""``model.template: checkpoint``: the ``chat_template`` (Jinja) that a model's own directory carries.

Transformers' files are read from beside the tokenizer: ``chat_template.jinja``, ``chat_template.json``,
``processor_config.json`` or ``tokenizer_config.json``. Which tokens are trained on comes from the text's generation
markers where it has them, else from rendering the conversation up to each answer.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from megavlm.config.errors import UserError
from megavlm.data.chat_files import ChatFiles
from megavlm.data.jinja_sandbox import START, STOP, compiled, render
from megavlm.data.schema import FILM_PLACEHOLDER, IMAGE_PLACEHOLDER, VISUAL, Turn
from megavlm.data.template import TEXT, ControlToken, Span, Template, TemplateError, trained

NAME = "checkpoint"
_WORDS = ("zqa", "zqb", "zqc", "zqd")
"""Texts of the conversations that a template is tried on."""
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SLOTS = (
    "<image>", "<|image_pad|>", "<imgpad>", "<image_placeholder>", "<IMG_CONTEXT>", "<image_soft_token>", "<|image|>",
    "[IMG]", "<start_of_image>", "<im_patch>", "<|image_1|>",
)  # fmt: skip
_FILMS = ("<|video_pad|>", "<video>", "<|video|>", "<VIDEO_CONTEXT>")
_TOKEN = re.compile(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])")

Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class CheckpointTemplate(Template):
    """A Jinja text as a template; made by :func:`checkpoint_template`."""

    renders: ClassVar[bool] = True
    text: str
    """The Jinja text."""
    variables: tuple[tuple[str, str], ...]
    """Names and texts of the special tokens that it may write."""
    parts: frozenset[str]
    """Roles whose content it takes as a list of parts; the others' is text."""
    shows_images: bool
    """Whether it writes the slot of an image part; else the slot stands in the text."""
    where: str
    """Its file, for messages."""
    film: str = ""
    """What it writes for a film part, marks and all, where it takes parts; empty where it knows no films."""

    @property
    def fingerprint(self) -> str:
        """Name and a digest of what decides the tokens; not of where the file lies, and the same in every process."""
        return self._digest({"where": None, "parts": repr(sorted(self.parts)), "film": None})

    @property
    def former_fingerprints(self) -> frozenset[str]:
        """Those with the file's place, and with a set's order, which is another one in each process."""
        orders = (", ".join(map(repr, order)) for order in itertools.permutations(self.parts))
        return frozenset(
            self._digest({"parts": f"frozenset({{{text}}})" if text else "frozenset()", "film": None})
            for text in orders
        )

    def spans(self, turns: Sequence[Turn], *, prompt: bool = False) -> list[Span]:
        """Return a conversation as the Jinja text writes it.

        Raises:
            TemplateError: it refuses the conversation, leaves an image out, or the mask is not exact.
        """
        whole = self._rendered(turns, prompt=prompt)
        text = whole.replace(START, "").replace(STOP, "")
        films = sum(turn.text.count(FILM_PLACEHOLDER) for turn in turns)
        film = self.film or FILM_PLACEHOLDER
        if (films or not self.film) and text.count(film) != films:
            raise TemplateError(
                f"{self.where}: the chat template shows {text.count(film)} film(s), the conversation {films}"
            )
        shown = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
        slot = self.slot.name
        if text.count(slot) != shown:
            raise TemplateError(
                f"{self.where}: the chat template shows {text.count(slot)} image(s), the conversation {shown}"
            )
        found = [Span(piece) for piece in self.begin if not text.startswith(piece)]
        regions = [] if prompt else self._marked(whole) if self._has_markers else self._prefixes(turns, text)
        weights = [turn.weight for turn in turns if turn.role == "assistant"]
        if set(weights) <= {1.0}:
            weights = [1.0] * len(regions)
        elif regions and len(weights) != len(regions):
            raise TemplateError(f"{self.where}: which answer has which weight cannot be told in the rendered text")
        at = 0
        for (start, end), weight in zip(regions, weights, strict=False):  # a prompt has no regions
            found += [Span(text[at:start]), Span(text[start:end], trained=True, weight=weight)]
            at = end
        found.append(Span(text[at:]))
        if films:
            found = [replace(one, text=one.text.replace(film, FILM_PLACEHOLDER)) for one in found]
        return [replace(one, text=one.text.replace(slot, IMAGE_PLACEHOLDER)) for one in found if one.text]

    def check_training(self) -> None:
        """Check on conversations of words that the mask is exact.

        Raises:
            TemplateError: it is not; the message says why, and what to do.
        """
        try:
            for turns in _TRIED:
                spans = self.spans(turns)
                answers = [turn.text for turn in turns if turn.role == "assistant"]
                kept = [span.text for span in spans if span.trained]
                if len(kept) != len(answers) or not all(a in b for a, b in zip(answers, kept, strict=True)):
                    raise TemplateError(f"{self.where}: the chat template marks {kept} for the answers {answers}")
        except TemplateError as error:
            raise TemplateError(
                f"model.template: {self.name} cannot be trained on, as its label mask is not exact ({error}); name "
                "the registered template that this model was made for (docs/templates.md), or put {% generation %} "
                "around what the assistant says"
            ) from None

    @functools.cached_property
    def _written_before_answers(self) -> str:
        try:
            prompt = self._rendered(_TRIED[0][:1], prompt=True)
            whole = self._rendered(_TRIED[0], prompt=False).replace(START, "").replace(STOP, "")
        except TemplateError:
            return ""
        before = whole.partition(_WORDS[1])[0]
        found = before[len(prompt) :] if before.startswith(prompt) else ""
        return "" if found.strip() else found

    @property
    def answer_prefix(self) -> str:
        """White space that a model says in front of an answer's own text."""
        return self._written_before_answers

    def question(self, text: str) -> str:
        """Return the last user's own words, of a prompt's text that this template wrote."""
        first = self._rendered([Turn("user", _WORDS[0])], prompt=True)
        later = self._rendered([Turn("user", "?"), Turn("assistant", "!"), Turn("user", _WORDS[0])], prompt=True)
        before = _common_end(first.partition(_WORDS[0])[0], later.partition(_WORDS[0])[0].rpartition("!")[2])
        after = _common_end(first.partition(_WORDS[0])[2][::-1], later.partition(_WORDS[0])[2][::-1])[::-1]
        text = text.rpartition(after)[0] if after.strip() and after in text else text
        return text.rpartition(before)[2] if before.strip() else text

    @property
    def _has_markers(self) -> bool:
        return _MARKERS.search(self.text) is not None

    def _rendered(self, turns: Sequence[Turn], *, prompt: bool) -> str:
        return self._render(self.messages(turns), prompt=prompt)

    def _render(self, messages: Messages, *, prompt: bool) -> str:
        values = {**dict(self.variables), "messages": messages, "add_generation_prompt": prompt, "tools": None,
                  "documents": None}  # fmt: skip
        return render(self.text, values, self.where)

    def messages(self, turns: Sequence[Turn]) -> Messages:
        """Return turns as the Jinja text takes them.

        Raises:
            TemplateError: a text holds the marks that stand around an answer.
        """
        found: Messages = []
        for turn in turns:
            if START in turn.text or STOP in turn.text:
                raise TemplateError("a text holds U+0000 as the marks of an answer do")
            text = turn.text if self.shows_images else turn.text.replace(IMAGE_PLACEHOLDER, self.slot.name)
            content: Any = text
            if turn.role in self.parts:
                content = list(_as_parts(text))
                content = content or [{"type": "text", "text": ""}]
            found.append({"role": turn.role, "content": content})
        return found

    def _marked(self, whole: str) -> list[tuple[int, int]]:
        """Return start and end of what stands between markers, in the text without them."""
        regions: list[tuple[int, int]] = []
        size, start = 0, None
        for part in re.split(f"({re.escape(START)}|{re.escape(STOP)})", whole):
            if part == START:
                if start is not None:
                    raise TemplateError(f"{self.where}: generation markers stand in one another")
                start = size
            elif part == STOP:
                if start is None:
                    raise TemplateError(f"{self.where}: a generation marker ends what none began")
                # What one answer is made of may stand in several blocks.
                joins = bool(regions) and regions[-1][1] == start
                regions.append((regions.pop()[0] if joins else start, size))
                start = None
            else:
                size += len(part)
        if start is not None:
            raise TemplateError(f"{self.where}: a generation marker has no end")
        return [region for region in regions if region[0] < region[1]]

    def _prefixes(self, turns: Sequence[Turn], text: str) -> list[tuple[int, int]]:
        """Return start and end of each answer with what ends it, from the conversation rendered up to there."""
        regions: list[tuple[int, int]] = []
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._rendered(turns[:i], prompt=True)
            whole = text if i == len(turns) - 1 else self._rendered(turns[: i + 1], prompt=False)
            if not whole.startswith(before) or len(whole) == len(before):
                raise TemplateError(
                    f"{self.where}: rendered up to answer {len(regions) + 1}, a conversation is not how it goes on"
                )
            if not text.startswith(whole):
                raise TemplateError(f"{self.where}: answer {len(regions) + 1} is written otherwise when more follows")
            answer = whole[len(before) :]
            found = answer.rfind(turn.text.strip())
            if found < 0:
                raise TemplateError(f"{self.where}: the text of answer {len(regions) + 1} is changed")
            tail = answer[found + len(turn.text.strip()) :]
            # White space behind the token that ends an answer leads to the next turn.
            end = len(whole) - (len(tail) - len(tail.rstrip()) if tail.strip() else 0)
            regions.append((len(before), end))
        return regions


_TRIED = (
    (Turn("user", _WORDS[0]), Turn("assistant", _WORDS[1])),
    (Turn("user", _WORDS[0]), Turn("assistant", _WORDS[1]), Turn("user", _WORDS[2]), Turn("assistant", _WORDS[3])),
)


def checkpoint_template(tokenizer: Path, name: str = NAME) -> CheckpointTemplate:
    """Return the chat template that lies beside a tokenizer.

    Args:
        tokenizer: the tokenizer's file.
        name: ``checkpoint``, or ``checkpoint:NAME`` for one of several.

    Raises:
        UserError: there is none, or it cannot be used; the message names the file.
    """
    files = ChatFiles(tokenizer)
    text, where = files.template(name.partition(":")[2])
    compiled(text, where)
    made = CheckpointTemplate(
        name=name, title="the checkpoint's own chat_template", user=(TEXT,), assistant=trained(TEXT), text=text,
        variables=tuple(sorted(files.tokens.items())), parts=frozenset(), shows_images=False, where=where,
        begin=files.begin(), eos=files.ends(), stop_ids=files.stop_ids(),
    )  # fmt: skip
    made = _with_forms(made)
    made = _with_film(_with_slot(made, files.image_names()))
    stop = _stop_of(made)
    known = files.known_tokens()
    return replace(made, tokens=(ControlToken((stop,)),), stops=(stop,)) if stop in known else made


def _with_forms(template: CheckpointTemplate) -> CheckpointTemplate:
    """Find out which roles' content the text takes as parts.

    Raises:
        UserError: it shows a user's words in neither form.
    """
    parts: set[str] = set()
    reasons: list[str] = []
    for role, before in (("user", []), ("assistant", [Turn("user", "?")]), ("system", [])):
        behind = [Turn("user", "?")] if role == "system" else []
        for as_parts in (True, False):
            one = replace(template, parts=frozenset({*parts, role} if as_parts else parts - {role}))
            try:
                text = one._rendered([*before, Turn(role, _WORDS[0]), *behind], prompt=role != "assistant")
            except TemplateError as error:
                reasons.append(str(error))
                continue
            if text.count(_WORDS[0]) == 1 and "'type'" not in text and '"type"' not in text:
                parts = set(one.parts)
                break
        else:
            if role == "user":
                reason = reasons[-1] if reasons else f"{template.where}: it does not write what a user says"
                raise UserError(f"model.template: {template.name} cannot be used: {reason}")
    return replace(template, parts=frozenset(parts))


def _with_slot(template: CheckpointTemplate, names: Sequence[str]) -> CheckpointTemplate:
    """Find out what the text writes for an image."""
    names = [*dict.fromkeys([*names, *_SLOTS])]
    if "user" in template.parts:
        shown = replace(template, shows_images=True)
        with_image = shown._rendered([Turn("user", f"{IMAGE_PLACEHOLDER}{_WORDS[0]}")], prompt=True)
        without = shown._rendered([Turn("user", _WORDS[0])], prompt=True)
        written = [name for name in names if with_image.count(name) == without.count(name) + 1]
        if written:
            return replace(shown, slot=ControlToken((written[0],), appended=True), picture="{image}")
    return replace(template, slot=ControlToken(tuple(names), appended=True))


def _with_film(template: CheckpointTemplate) -> CheckpointTemplate:
    """Find out what the text writes for a film; where content is text, the film's own place stays in it."""
    if "user" not in template.parts:
        return template
    first, second = _WORDS[:2]
    try:
        text = template._rendered([Turn("user", f"{first}{FILM_PLACEHOLDER}{second}")], prompt=True)
    except TemplateError:
        return template
    written = text.partition(first)[2].partition(second)[0].strip() if first in text and second in text else ""
    if not written:  # in front of all words, or nowhere
        written = next((name for name in _FILMS if name in text), "")
    return replace(template, film=written)


def _stop_of(template: CheckpointTemplate) -> str:
    """Return the token that stands behind an answer; empty where there is none."""
    try:
        text = template._rendered(_TRIED[1], prompt=False).replace(STOP, "").replace(START, "")
    except TemplateError:
        return ""
    found = _TOKEN.match(text.partition(_WORDS[1])[2])
    return found[1] if found else ""


def _as_parts(text: str) -> Iterator[dict[str, str]]:
    """Yield a text as parts, with one for each image and film."""
    at = 0
    for found in VISUAL.finditer(text):
        if found.start() > at:
            yield {"type": "text", "text": text[at : found.start()]}
        yield {"type": "video" if found[0] == FILM_PLACEHOLDER else "image"}
        at = found.end()
    if at < len(text):
        yield {"type": "text", "text": text[at:]}


def _common_end(one: str, other: str) -> str:
    size = 0
    while size < min(len(one), len(other)) and one[-1 - size] == other[-1 - size]:
        size += 1
    return one[len(one) - size :]
