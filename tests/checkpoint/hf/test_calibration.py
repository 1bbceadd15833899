"""Samples that an Int4 export is calibrated on: which are left out, and with which cause."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from megavlm.checkpoint.hf.calibration import _inputs
from megavlm.data.schema import FILM_PLACEHOLDER

TEMPLATE = (
    "{% for one in messages %}{% if (one.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{{ one.role }}{% endfor %}"
)


class Processor:
    """Refuses as those of Transformers do: by the template, and for pictures that are too narrow."""

    tokenizer = None

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
        def refuse(why: str) -> None:
            raise ValueError(why)

        return ImmutableSandboxedEnvironment().from_string(TEMPLATE).render(messages=messages, raise_exception=refuse)

    def __call__(self, text: list[str], images: list[Image.Image] | None, **_: Any) -> dict[str, Any]:
        if any(max(one.size) / min(one.size) > 200 for one in images or ()):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return {"input_ids": torch.tensor([[len(one) for one in text]]), "told": text}


def sample(*turns: tuple[str, str], size: tuple[int, int] = (4, 4), **more: Any) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    record = {"conversations": [{"from": who, "value": text} for who, text in turns], **more}
    return {"json": json.dumps(record).encode(), "img0": file.getvalue()}


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (sample(("user", f"{FILM_PLACEHOLDER}What?"), ("assistant", "a"), films=["a.mp4"]), "with a film"),
        (sample(("system", "s"), ("user", "q"), ("assistant", "a")), "refuses (Roles must alternate)"),
        (sample(("user", "<img>a</img>q"), ("assistant", "a"), size=(201, 1)), "refuses (absolute aspect ratio"),
        ({"json": b"[]"}, "broken ("),
    ],
)
def test_what_is_left_out(raw: dict[str, Any], cause: str) -> None:
    found = _inputs(raw, Processor())
    assert isinstance(found, str) and cause in found


def test_what_is_taken() -> None:
    found = _inputs(sample(("user", "<img>a</img>q"), ("assistant", "a")), Processor())
    assert isinstance(found, dict) and list(found) == ["input_ids"]
