"""A question, its answer, and earlier ones: alpaca's ``instruction``, ``input``, ``output``; ``query``, ``response``.

Sources (facts): ``data/README.md`` of github.com/hiyouga/LLaMA-Factory (the question is instruction, line end, input;
``history`` is a list of pairs whose answers are trained on too; ``system``, ``images``) and the custom data sets of
ms-swift (``query``, ``response``, ``history``). Pictures that ``<image>`` gives no place stand in front of the first
question.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megavlm.data.formats.base import Broken, BrokenError, Record, each, field
from megavlm.data.formats.keys import is_given
from megavlm.data.formats.messages import convert_one as convert_messages
from megavlm.data.formats.source import Source

_FORMS = (("instruction", "output"), ("query", "response"))
_OWN = frozenset({"instruction", "input", "output", "query", "response", "history"})


def matches(source: Source) -> bool:
    """Whether records have a question and an answer by these names."""
    return any(is_alpaca(record) for record in source.head)


def is_alpaca(record: Record) -> bool:
    """Whether a record is in this form."""
    return any({question, answer} <= record.keys() for question, answer in _FORMS)


def read(source: Source) -> Iterator[Record | Broken]:
    """Yield the records.

    Raises:
        UserError: The file holds no list.
    """
    yield from each(source.rows(), lambda entry: convert_one(entry, source), "id")


def convert_one(entry: Any, source: Source) -> Record:
    """Convert one record.

    Raises:
        BrokenError: It cannot be one here.
    """
    forms = [form for form in _FORMS if isinstance(entry, dict) and any(is_given(entry.get(key)) for key in form)]
    if len(forms) > 1:
        raise BrokenError("bad record", "'instruction' and 'query' are two forms; keep one")
    question, answer = forms[0] if forms else _FORMS[0]
    given = field(entry, question)
    more = entry.get("input")
    if is_given(more):
        if question != "instruction" or not isinstance(more, str):
            raise BrokenError("bad record", f"'input' beside {question!r} must be text, and beside 'instruction'")
        given = f"{given}\n{more}" if given else more
    messages = [*_history(entry.get("history")), _said("user", given), _said("assistant", field(entry, answer))]
    rest = {key: value for key, value in entry.items() if key not in _OWN}
    return convert_messages(rest | {"messages": messages}, source)


def _said(role: str, text: str) -> Record:
    return {"role": role, "content": text}


def _history(history: Any) -> list[Record]:
    found: list[Record] = []
    for exchange in history if isinstance(history, list) else [history] if is_given(history) else []:
        if not isinstance(exchange, list) or len(exchange) != 2 or not all(isinstance(one, str) for one in exchange):
            raise BrokenError("bad record", "'history' must be a list of pairs of question and answer")
        found += [_said("user", exchange[0]), _said("assistant", exchange[1])]
    return found
