"""The row of Vary in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spliced_rows import NO_CLASS, staged
from torch import nn
from transformers import CLIPVisionConfig
from vary_models import VARY, Sam, VaryModel, VarySource
from whole import Lack, Published, Stage, WholeFamily

from megavlm.config.schema import ModelConfig

_TRAINS = ("connector", "language")
# Table 1 of arXiv 2401.12503 without the three sets whose size it does not tell: 6,397K samples, one epoch.
_PRETRAIN = Stage(_TRAINS, 5e-5, 12_494, 512, 4096, 256)
_SFT = Stage(_TRAINS, 2e-5, 156, 512, 4096, 256)


def built(model: ModelConfig) -> tuple[nn.Module, list[nn.Module]]:
    """Build the published definition of a preset."""
    low, high, language = model.vision.low, model.vision.high, model.language
    clip = CLIPVisionConfig(
        hidden_size=low.hidden_size, intermediate_size=low.ffn_hidden_size, num_hidden_layers=low.num_layers + 1,
        num_attention_heads=low.num_attention_heads, image_size=low.image_size, patch_size=low.patch_size,
    )  # fmt: skip
    sam = Sam(
        high.hidden_size, high.num_attention_heads, high.ffn_hidden_size, high.num_layers, tuple(high.global_layers),
        high.neck_size, high.image_size, high.patch_size, high.window_size,
    )  # fmt: skip
    heads, width, rows = language.num_attention_heads, language.hidden_size, language.vocab_size
    whole = VaryModel(clip, sam, width, language.num_layers, heads, language.ffn_hidden_size, rows)
    tower: Any = getattr(whole.vision_tower, "vision_model", whole.vision_tower)
    return nn.ModuleList([whole, nn.Linear(width, rows, bias=False)]), [tower.post_layernorm, tower.encoder.layers[-1]]


def vary_rows(header: str, planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the row; arguments are what rows share: ``headers``, ``planner``."""
    return {
        "vary": WholeFamily(
            checkpoints=tuple(VARY),
            template="vary",
            image={"kind": "crop_squash", "resample": "bicubic"},
            source=VarySource(),
            uneven=VarySource(low_heads=3, high_heads=3, inner=75),
            others=Lack("Vary-toy is published with one pair of towers and one language model; Vary's weights are not"),
            answers=NO_CLASS,
            lora=("c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"),
            presets={"vary_toy": Published(2_237_365_504)},
            built=built,
            recipes=staged("vary_toy", ("pretrain", "sft"), (_PRETRAIN, _SFT)),
            headers=header,
            planner=planner,
        )
    }
