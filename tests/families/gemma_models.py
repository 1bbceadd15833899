"""Tiny PaliGemma and Gemma 3: by Transformers, with the tokenizer and the processor files that published ones have."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from family_cases import made
from safetensors.torch import save_file
from tokenizer_files import sentences
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)
from whole import Shown
from whole_source import TransformersSource

from megavlm.config.schema import ModelConfig

SIDE, IMAGE = 28, 119
_TEXT: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 4096,
    "pad_token_id": None, "initializer_range": 0.15,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": 7, "vision_use_head": False,
}  # fmt: skip
PALIGEMMA_FILES: dict[str, Any] = {
    "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3,
    "image_processor_type": "SiglipImageProcessor", "image_seq_length": 16, "image_std": [0.5] * 3,
    "processor_class": "PaliGemmaProcessor", "resample": 3, "rescale_factor": 1 / 255,
    "size": {"height": SIDE, "width": SIDE},
}  # fmt: skip
"""``preprocessor_config.json`` as google/paligemma-3b-pt-224 has it, for 28 pixels."""


def paligemma(
    text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, image: int = IMAGE
) -> PreTrainedModel:
    """PaliGemma: heads that are wider than the model, as one key/value head of eight is shared by all."""
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**{**_VISION, **(vision or {})}),
        text_config=GemmaConfig(**{**_TEXT, **(text or {})}), image_token_index=image,
        projection_dim=64, hidden_size=64,
    )  # fmt: skip
    return made(PaliGemmaForConditionalGeneration, config)


class PrefixSource(TransformersSource):
    """A class whose tokens in front of an answer see each other both ways."""

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """A sample by itself is a prompt, all of which is prefix."""
        sample = super().shown(model, sizes, words)
        kinds = {"token_type_ids": torch.zeros_like(sample.ids)[None]}
        return Shown(sample.ids, {**sample.given, **kinds}, sample.views, sample.sizes, sample.layouts)

    def unlabelled(self, sample: Shown) -> int:
        """Return how many tokens stand in front of the answer: pictures, what stands before and between, two words."""
        slots = (sample.ids == self.image).nonzero()
        return int(slots.max()) + 3 if len(slots) else 4

    def logits(self, sample: Shown) -> Tensor:
        """Run the model once, with an answer."""
        kinds = (torch.arange(len(sample.ids)) >= self.unlabelled(sample)).long()[None]
        given = {**sample.given, "token_type_ids": kinds}
        return super().logits(Shown(sample.ids, given, sample.views, sample.sizes, sample.layouts))


def write_gemma(directory: Path, added: tuple[str, ...]) -> dict[str, int]:
    """Gemma's BPE with byte fallback, which puts nothing in front of a text; returns the ids of ``added``."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    control = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*control, "\n", *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator([f" {word}" for text in sentences() for word in text.split()], trainer)
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in control]
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    special = [token for token in added if token.endswith("image>")]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added if token not in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    kinds = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GemmaTokenizerFast", "add_bos_token": False, **kinds})
    )
    found = {token: tokenizer.token_to_id(token) for token in added}
    return {token: number for token, number in found.items() if number is not None}


def save_with(files: dict[str, Any], make: Callable[[], PreTrainedModel], directory: Path) -> Path:
    """Write a checkpoint with its processor's file."""
    make().save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(files))
    return directory


def _rename(model: PreTrainedModel, directory: Path) -> None:
    """Write the weights again, by the hub's names."""
    renamed = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("model.")
        if name == "lm_head.weight":
            continue
        name = name.replace("language_model.", "language_model.model.", 1)
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        renamed[name] = value.contiguous().clone()
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})


def paligemma_hub(directory: Path) -> Path:
    """The names of the hub's files, and a config.json that leaves out what its class knows, as published ones do."""
    save_with(PALIGEMMA_FILES, paligemma, directory)
    _rename(paligemma(), directory)
    path = directory / "config.json"
    tree = json.loads(path.read_text())
    for key in ("use_bidirectional_attention", "rope_parameters", "hidden_act", "hidden_activation"):
        tree["text_config"].pop(key, None)
    path.write_text(json.dumps(tree))
    return directory


GEMMA3_FILES: dict[str, Any] = {
    "do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5] * 3, "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 4,
    "image_std": [0.5] * 3, "pan_and_scan_max_num_crops": None, "pan_and_scan_min_crop_size": None,
    "pan_and_scan_min_ratio_to_activate": None, "processor_class": "Gemma3Processor", "resample": 2,
    "rescale_factor": 1 / 255, "size": {"height": SIDE, "width": SIDE},
}  # fmt: skip
"""``preprocessor_config.json`` as google/gemma-3-4b-it has it, for 28 pixels."""


def gemma3(
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    image: int = IMAGE,
    tokens: int = 4,
    **keys: Any,
) -> PreTrainedModel:
    """Gemma 3: windows shorter than a picture in three of four layers, whose positions are not stretched."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    own = {"query_pre_attn_scalar": 32, "sliding_window": 3, "layer_types": kinds, "rope_parameters": rope}
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**{**_VISION, **(vision or {})}),
        text_config=Gemma3TextConfig(**{**_TEXT, **own, **(text or {})}), image_token_index=image,
        mm_tokens_per_image=tokens, **{"boi_token_index": image - 3, "eoi_token_index": image - 2, **keys},
    )  # fmt: skip
    model = made(Gemma3ForConditionalGeneration, config)
    with torch.no_grad():  # its class begins with zeros
        model.model.multi_modal_projector.mm_input_projection_weight.copy_(torch.randn(40, 64) * 0.2)
    return model


class PictureSource(TransformersSource):
    """A class that is told which tokens are pictures', as these see each other both ways."""

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Say which tokens are slots."""
        sample = super().shown(model, sizes, words)
        kinds = {"token_type_ids": (sample.ids == self.image).long()[None]}
        return Shown(sample.ids, {**sample.given, **kinds}, sample.views, sample.sizes, sample.layouts)


def gemma3_hub(directory: Path) -> Path:
    """The names of the hub's files."""
    save_with(GEMMA3_FILES, gemma3, directory)
    _rename(gemma3(), directory)
    return directory


GEMMA3 = {
    "gemma3": ("gemma3", functools.partial(save_with, GEMMA3_FILES, gemma3)),
    "gemma3_hub": ("gemma3", gemma3_hub),
}
PALIGEMMA = {
    "paligemma": ("paligemma", functools.partial(save_with, PALIGEMMA_FILES, paligemma)),
    "paligemma_hub": ("paligemma", paligemma_hub),
}
"""Checkpoints: family, and what writes them."""


def paligemma_answers(directory: Path) -> Path:
    """With tokenizer and processor; locations as published ones have them."""
    directory.mkdir(parents=True, exist_ok=True)
    locations = [f"<loc{i:0>4}>" for i in range(1024)] + [f"<seg{i:0>3}>" for i in range(128)]
    ids = write_gemma(directory, ("<image>", *locations))
    model = paligemma({"vocab_size": 1664}, image=ids["<image>"])
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PALIGEMMA_FILES))
    return directory


_GEMMA3_TOKENS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
_GEMMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{% for one in message['content'] %}"
    "{{ '<start_of_image>' if one['type'] == 'image' else one['text'] | trim }}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def gemma3_answers(directory: Path) -> Path:
    """With tokenizer, template and processor."""
    directory.mkdir(parents=True, exist_ok=True)
    write_gemma(directory, ())
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _GEMMA3_TOKENS])
    tokenizer.save(str(path))
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    told = directory / "tokenizer_config.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "extra_special_tokens": named}))
    start, end, slot = (tokenizer.token_to_id(token) for token in named.values())
    text = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 1024}
    gemma3(text, image=slot, boi_token_index=start, eoi_token_index=end).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(GEMMA3_FILES))
    own = {"image_seq_length": 4, "processor_class": "Gemma3Processor"}
    (directory / "processor_config.json").write_text(json.dumps(own))
    (directory / "chat_template.jinja").write_text(_GEMMA3_CHAT)
    return directory
