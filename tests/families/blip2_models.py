"""Tiny BLIP-2 on a Llama, by Transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from family_cases import CLIP_MEAN, CLIP_STD, made
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    PreTrainedModel,
)
from whole import Lack, Shown, WholeFamily
from whole_source import TransformersSource

SIDE, IMAGE = 28, 119
FILES: dict[str, Any] = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": CLIP_MEAN,
    "image_processor_type": "BlipImageProcessor", "image_std": CLIP_STD, "processor_class": "Blip2Processor",
    "resample": 3, "rescale_factor": 1 / 255, "size": {"height": SIDE, "width": SIDE},
}  # fmt: skip
"""``preprocessor_config.json`` as Salesforce/blip2-opt-2.7b has it, for 28 pixels."""


def blip2(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> PreTrainedModel:
    """Three layers of queries, two of which look at the patches."""
    tower: dict[str, Any] = {
        "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": 7, "initializer_range": 0.05,
    }  # fmt: skip
    queries = Blip2QFormerConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, encoder_hidden_size=40,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    language: dict[str, Any] = {
        "vocab_size": 120, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": None,
        "initializer_range": 0.15,
    }  # fmt: skip
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**{**tower, **(vision or {})}), qformer_config=queries,
        text_config=LlamaConfig(**{**language, **(text or {})}), num_query_tokens=5, image_token_index=IMAGE,
    )  # fmt: skip
    model = made(Blip2ForConditionalGeneration, config)
    with torch.no_grad():
        model.query_tokens.copy_(torch.randn(1, 5, 32))  # zeros, in Transformers
    return model


def save(directory: Path) -> Path:
    """Write it, and how pictures are made pixels."""
    blip2().save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(FILES))
    return directory


BLIP2: dict[str, tuple[str, Callable[[Path], Path]]] = {"blip2": ("blip2", save)}
"""What makes a checkpoint, and its family."""


class Blip2Source(TransformersSource):
    """The class, which takes no text without a picture: its language model does."""

    def logits(self, sample: Shown) -> Tensor:
        """Run the model once."""
        if sample.given:
            return super().logits(sample)
        found: Tensor = self.model.language_model(input_ids=sample.ids[None]).logits[0]
        return found

    def answer(self, sample: Shown, tokens: int) -> list[int]:
        """Generate greedily; from features the class gives the new tokens alone."""
        ids = sample.ids[None]
        told = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        if sample.given:
            whole = self.model.generate(input_ids=ids, **sample.given, attention_mask=mask, **told)
        else:
            whole = self.model.language_model.generate(input_ids=ids, attention_mask=mask, **told)
        return list(whole[0, -tokens:].tolist())


def blip2_rows(targets: tuple[str, ...], planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the row of ``whole_rows.py``; arguments are what rows share."""
    return {
        "blip2": WholeFamily(
            checkpoints=("blip2",),
            template=Lack("no model of the class on such a language model is published with one"),
            image={"kind": "squash"},
            source=Blip2Source("blip2", blip2, files=FILES),
            uneven=Blip2Source(
                "blip2",
                lambda: blip2({"num_key_value_heads": 1}, {"num_attention_heads": 5, "intermediate_size": 75}),
                files=FILES,
            ),
            others=Lack("Salesforce's own stand on OPT and FLAN-T5, which are not built here"),
            answers=Lack("convert check is not tried on it: its processor puts pictures in front of all; see `source`"),
            lora=targets,
            presets=Lack("none is published on such a language model; MiniGPT-4 publishes its linear layer alone"),
            built=Lack("there are no presets, and so no sizes"),
            recipes=Lack("there are no presets; MiniGPT-4 comes later"),
            headers=Lack("there are no recipes of it yet"),
            planner=planner,
        ),
    }
