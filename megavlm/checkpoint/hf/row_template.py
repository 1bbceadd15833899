"""A registered template (``megavlm.data.template``) in Jinja, as Transformers reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from megavlm.data.schema import IMAGE_PLACEHOLDER
from megavlm.data.template import IMAGES, SYSTEM, TEXT
from megavlm.data.tokenizer import Tokenizer

# What a turn says, in ``turn``: its text with pictures (a part without a place in the text begins a line), and its
# pictures alone.
_TURN = """\
{%- set turn = namespace(text='', images='', last='text') -%}
{%- if message['content'] is string -%}
{%- set turn.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{%- set turn.text = turn.text + part['text'] -%}
{%- set turn.last = 'text' -%}
{%- elif part['type'] in ('image', 'image_url') -%}
{%- set turn.images = turn.images + IMAGE -%}
{%- if not FIRST -%}
{%- if turn.text and not turn.text.endswith(('\\n', BEHIND)) and BEHIND -%}
{%- set turn.text = turn.text + '\\n' -%}
{%- endif -%}
{%- set turn.text = turn.text + IMAGE + BEHIND -%}
{%- set turn.last = 'image' -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if turn.last == 'image' and BEHIND -%}
{%- set turn.text = turn.text[:-1] -%}
{%- endif -%}
{%- if FIRST and turn.images -%}
{%- set turn.text = turn.text.strip() -%}
{%- endif -%}
{%- endif -%}
"""
_IMAGES_FIRST = """\
{%- for message in messages -%}
{%- if message['content'] is not string -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{{- IMAGE -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""


def row_template(tokenizer: Tokenizer, system_message: str, *, bare: bool = False) -> str:
    """Return the Jinja text of a tokenizer's template, a row.

    Args:
        tokenizer: of the model, with its template.
        system_message: of a conversation that has none; empty for none.
        bare: a picture is its slot's token alone: the processor writes what stands around it.
    """
    row = tokenizer.template

    def named(piece: str) -> str:
        return tokenizer.spelled.get(piece, piece)

    def written(pieces: Sequence[str], text: str = "turn.text", system: str = "state.system") -> str:
        own = {TEXT: text, SYSTEM: system, IMAGES: "turn.images"}
        terms: list[str] = []
        literal = ""
        for piece in pieces:
            if piece not in own:
                literal += named(piece)
                continue
            terms += [_literal(literal)] if literal else []
            terms.append(own[piece])
            literal = ""
        terms += [_literal(literal)] if literal else []
        return "{{- " + " + ".join(terms) + " -}}" if terms else ""

    begin, end = map(named, row.image)
    image = named(row.slot.name) if bare else begin + named(row.slot.name) + end
    behind = row.picture.replace("{image}", "")
    assert behind in ("", " ", "\n"), row.picture  # with a number: Qwen-VL's own text
    gap = f"({_literal(row.gap)} if not turn.text.startswith(IMAGE) else '') + " if row.gap else ""
    folded = bool(row.user_with_system) and not row.system
    system = written(row.system, "state.system")
    lines = [
        f"{{%- set IMAGE = {_literal(image)} -%}}", f"{{%- set BEHIND = {_literal(behind)} -%}}",
        f"{{%- set FIRST = {'true' if row.images_first else 'false'} -%}}",
        f"{{%- set state = namespace(system={_literal(system_message)}) -%}}",
        written(row.begin), *([_IMAGES_FIRST] if row.images_first else []),
        "{%- if messages and messages[0]['role'] == 'system' -%}", "{%- set message = messages[0] -%}", _TURN,
        "{%- set state.system = turn.text -%}", "{%- endif -%}",
        *([] if folded else ["{%- if state.system -%}", system, "{%- endif -%}"]),
        "{%- for message in messages -%}", _TURN,
        "{%- if message['role'] == 'user' -%}",
        *(["{%- if state.system -%}", written(row.user_with_system), "{%- set state.system = '' -%}", "{%- else -%}"]
          if folded else []),
        written(row.user, gap + "turn.text"), *(["{%- endif -%}"] if folded else []),
        "{%- elif message['role'] == 'assistant' -%}",
        *(["{%- if loop.last -%}", written(row.last_assistant), "{%- else -%}"] if row.last_assistant else []),
        written(row.assistant), *(["{%- endif -%}"] if row.last_assistant else []),
        "{%- endif -%}", "{%- endfor -%}",
        "{%- if add_generation_prompt -%}", written(row.lead), "{%- endif -%}",
    ]  # fmt: skip
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines if line)


def _literal(text: str) -> str:
    """Return a text as Jinja writes it."""
    assert IMAGE_PLACEHOLDER not in text
    return json.dumps(text, ensure_ascii=False)
