"""What an Int4 export takes: samples, those that are left out with their cause; and layers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from torch import nn

from megavlm.checkpoint.hf.calibration import by_processor
from megavlm.checkpoint.hf.int4 import Int4Settings, _language_layers
from megavlm.config.errors import UserError
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
    found = by_processor(raw, Processor())
    assert isinstance(found, str) and cause in found


def test_what_is_taken() -> None:
    found = by_processor(sample(("user", "<img>a</img>q"), ("assistant", "a")), Processor())
    assert isinstance(found, dict) and list(found) == ["input_ids"]


class Decoder(nn.Module):
    """What a language model's layers may be: linear layers, or experts beside them."""

    def __init__(self, expert: nn.Module | None, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"proj": nn.Linear(width, 8), **({"experts": expert} if expert else {})})]
        )

    def get_decoder(self) -> nn.Module:
        return self


def test_layers_that_are_no_plain_ones_are_refused(tmp_path: Path) -> None:
    settings = Int4Settings(tmp_path / "hf", tmp_path / "out", "gptq", tmp_path, group_size=32)
    assert _language_layers(Decoder(None), settings) == ("layers", ["layers.0.proj"])
    fused = nn.Module()
    fused.gate_up = nn.Parameter(torch.zeros(2, 4, 8))
    for expert in (fused, nn.ModuleList([nn.Linear(64, 8)])):
        with pytest.raises(UserError, match=r"layers\.0\.experts.*mixtures of experts"):
            _language_layers(Decoder(expert), settings)
    crossing = Decoder(None)
    crossing.layers[0]["cross_attn"] = nn.Linear(64, 8)
    with pytest.raises(UserError, match=r"layers\.0\.cross_attn: int4 does not take layers that attend to pictures"):
        _language_layers(crossing, settings)
    with pytest.raises(UserError, match=r"--group-size 32: layers\.0\.proj maps 48 to 8"):
        _language_layers(Decoder(None, width=48), settings)
