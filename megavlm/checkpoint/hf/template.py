"""The chat template of what is trained here, in Jinja, as Transformers reads it; and the proof of its ids.

A template gives one text, which is encoded as a whole. Qwen-VL's ChatML has a text of its own here: header, content and
end of a turn are encoded apart, and pictures of a turn are called Picture 1, 2, .. (``megavlm.inference``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from megavlm.checkpoint.hf.row_template import row_template
from megavlm.data.chat import count_images, encode_prompt
from megavlm.data.schema import IMAGE_PLACEHOLDER, Turn
from megavlm.data.template import TemplateError
from megavlm.data.tokenizer import Tokenizer

_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' and SYSTEM -%}
{{- START + 'system\\n' + (GAP if not SYSTEM.startswith(BEGIN) else '') + SYSTEM + END + '\\n' -}}
{%- endif -%}
{%- set turn = namespace(text='', images=0) -%}
{%- if message['content'] is string -%}
{%- set turn.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{%- set turn.text = turn.text + part['text'] -%}
{%- elif part['type'] in ('image', 'image_url') -%}
{%- set turn.images = turn.images + 1 -%}
{%- if turn.text and not turn.text.endswith('\\n') -%}
{%- set turn.text = turn.text + '\\n' -%}
{%- endif -%}
{%- set path = part['image'] if PATHS and part['image'] is string else '' -%}
{%- set turn.text = turn.text + 'Picture ' + turn.images|string + ': ' + OPEN + path + CLOSE + '\\n' -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set gap = GAP if turn.text and not turn.text.startswith(BEGIN) else '' -%}
{{- START + message['role'] + '\\n' + gap + turn.text + END + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- START + 'assistant\\n' -}}
{%- endif -%}
"""

Samples = Sequence[tuple[Turn, ...]]
SAMPLES: Samples = (
    (Turn("user", "Hi?"),),
    (Turn("user", f"Picture 1: {IMAGE_PLACEHOLDER}\nHow many cats?"), Turn("assistant", "Two."), Turn("user", "Sure?")),
    (Turn("system", "You answer in one word."), Turn("user", f"{IMAGE_PLACEHOLDER}\nwhat is it"),),
    (Turn("user", f"Picture 1: {IMAGE_PLACEHOLDER}\nPicture 2: {IMAGE_PLACEHOLDER}\n(1) 你好 - compare"),),
)  # fmt: skip
"""Conversations that the template is tried on."""


def chatml(tokenizer: Tokenizer, system_message: str, *, slots: bool, bare: bool) -> tuple[str, int]:
    """Return the template and how many of :data:`SAMPLES` it encodes otherwise than they are trained.

    Some tokenizers put a space before text, so before the content of a turn as well, which is encoded apart: the
    template then has that space.

    Args:
        tokenizer: of the model, with the tokens of all roles.
        system_message: of a conversation that has none; empty for none.
        slots: a picture is one token between ``<img>`` and ``</img>``, which a processor repeats (LLaVA); else its
            path stands there, as Qwen-VL's tokenizer reads it.
        bare: with ``slots``, it is that token alone: the processor writes what stands around it.
    """
    tried = [_tried(tokenizer, system_message, gap, slots=slots, bare=bare) for gap in ("", " ")]
    return min(tried, key=lambda one: one[1])


def _tried(tokenizer: Tokenizer, system_message: str, gap: str, *, slots: bool, bare: bool) -> tuple[str, int]:
    def name(token: str) -> str:
        return tokenizer.decode([tokenizer.ids[token]])

    begin, close = map(name, tokenizer.template.image)
    slot = tokenizer.decode([tokenizer.imgpad_id])
    opened = begin + slot if slots else begin
    values: dict[str, str | bool] = {
        "START": name("<|im_start|>"), "END": name("<|im_end|>"), "BEGIN": begin, "OPEN": slot if bare else opened,
        "CLOSE": "" if bare else close,
        "PATHS": not slots, "SYSTEM": system_message, "GAP": gap,
    }  # fmt: skip
    head = "".join(f"{{%- set {key} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for key, value in values.items())
    wrong = 0
    for turns in SAMPLES:
        written = slot if bare else opened + close
        messages = [{"role": t.role, "content": t.text.replace(IMAGE_PLACEHOLDER, written)} for t in turns]
        trained = encode_prompt(turns, tokenizer, [(int(slots),)] * count_images(turns), system_message).tolist()
        text = render(head + _TEMPLATE, messages)
        wrong += tokenizer.encode(text.replace(slot, opened + close) if bare else text) != trained
    return head + _TEMPLATE, wrong


def row(tokenizer: Tokenizer, system_message: str, *, bare: bool) -> tuple[str, int]:
    """Return a registered template in Jinja, and how many of :data:`SAMPLES` it encodes otherwise than trained.

    Args: as :func:`chatml`.
    """
    text = row_template(tokenizer, system_message, bare=bare)
    slot = tokenizer.decode([tokenizer.imgpad_id])
    begin, end = (tokenizer.spelled.get(piece, piece) for piece in tokenizer.template.image)
    wrong = 0
    for turns in SAMPLES:
        if turns[0].role == "system" and not (tokenizer.template.system or tokenizer.template.user_with_system):
            turns = turns[1:]
        try:
            trained = encode_prompt(turns, tokenizer, [(1,)] * count_images(turns), system_message).tolist()
        except TemplateError:
            continue  # more exchanges than it holds
        messages = [{"role": turn.role, "content": _parts(turn.text, tokenizer.template.picture)} for turn in turns]
        said = render(text, messages)
        wrong += tokenizer.encode(said.replace(slot, begin + slot + end) if bare else said) != trained
    return text, wrong


def _parts(text: str, picture: str) -> list[dict[str, str]]:
    """Return a text as parts: what the template puts behind a picture is no part's text."""
    image = re.escape(IMAGE_PLACEHOLDER)
    pattern = rf"(?:Picture \d+: ?)?{image}\n?" if picture.endswith("\n") else rf"Picture \d+: ?{image}\n?|{image}"
    found: list[dict[str, str]] = []
    for index, one in enumerate(re.split(pattern, text)):
        found += [{"type": "image"}] if index else []
        found += [{"type": "text", "text": one}] if one else []
    return found


def render(template: str, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """Return what a template makes of messages, in the sandbox that Transformers uses."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415 - torch brings it; only an export needs it

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=add_generation_prompt)
