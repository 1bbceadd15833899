"""Tiny DeepSeek-VL-1.3B: by Transformers, and the same as its authors write it, with tokenizer and processor files."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from family_cases import _TEXT, _VISION, State, load, made, write
from safetensors.torch import save_file
from tokenizer_files import write_qwen2
from tokenizers import AddedToken, Tokenizer, processors
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    SamVisionConfig,
    SiglipVisionConfig,
)

from megavlm.families.deepseek_vl import TOWERS

SIDE, IMAGE = 28, 119
BEGIN, END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
PLACEHOLDER = "<image_placeholder>"
TOWERS["siglip_tiny_patch7_28"] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 7,
}  # fmt: skip
"""A tower of the size of tests, which a fork of the authors' code would have in its table."""

DEEPSEEK_FILES: dict[str, Any] = {
    "do_convert_rgb": None, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5] * 3, "image_processor_type": "DeepseekVLImageProcessor", "image_std": [0.5] * 3,
    "min_size": 14, "processor_class": "DeepseekVLProcessor", "resample": 3, "rescale_factor": 1 / 255,
    "size": {"height": SIDE, "width": SIDE},
}  # fmt: skip
"""``preprocessor_config.json`` as deepseek-community/deepseek-vl-1.3b-chat has it, for 28 pixels."""
ORIGINAL_FILES: dict[str, Any] = {
    "background_color": [127, 127, 127], "do_normalize": True, "image_mean": [0.5] * 3,
    "image_processor_type": "VLMImageProcessor", "image_size": SIDE, "image_std": [0.5] * 3, "min_size": 14,
    "processor_class": "VLChatProcessor", "rescale_factor": 1 / 255,
}  # fmt: skip
"""The same as deepseek-ai/deepseek-vl-1.3b-chat has it."""


def deepseek_vl(
    text: PretrainedConfig | None = None, *, tied: bool = False, image: int = IMAGE, **vision: Any
) -> PreTrainedModel:
    """DeepSeek-VL: SigLIP with erf GELU, its last layer behind the norm, and a Llama whose head is its own."""
    tower = SiglipVisionConfig(**{**_VISION, "hidden_act": "gelu", "vision_use_head": False, **vision})
    text = text or LlamaConfig(**{**_TEXT, "tie_word_embeddings": tied})
    config = DeepseekVLConfig(vision_config=tower, text_config=text, image_token_id=image, tie_word_embeddings=tied)
    one = made(DeepseekVLForConditionalGeneration, config)
    one.save_pretrained = functools.partial(_publish, one)  # type: ignore[method-assign]
    return one


LARGE = 64
"""Side of the larger rendering."""
HYBRID_FILES: dict[str, Any] = {
    **DEEPSEEK_FILES, "high_res_image_mean": [0.48145466, 0.4578275, 0.40821073], "high_res_resample": 3,
    "high_res_image_std": [0.26862954, 0.26130258, 0.27577711], "high_res_size": {"height": LARGE, "width": LARGE},
    "image_processor_type": "DeepseekVLHybridImageProcessor", "processor_class": "DeepseekVLHybridProcessor",
}  # fmt: skip
"""``preprocessor_config.json`` as deepseek-community/deepseek-vl-7b-chat has it, for 28 and 64 pixels."""


def deepseek_hybrid(
    text: PretrainedConfig | None = None, *, tied: bool = False, image: int = IMAGE, high: Any = None, **vision: Any
) -> PreTrainedModel:
    """DeepSeek-VL-7B: the same beside a SAM of 16 x 16 patches, whose windows of 5 do not fill its sides."""
    low = SiglipVisionConfig(**{**_VISION, "hidden_act": "gelu", "vision_use_head": False, **vision})
    sam = SamVisionConfig(
        **{
            "hidden_size": 32, "output_channels": 8, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_dim": 48,
            "image_size": LARGE, "patch_size": 4, "window_size": 5, "global_attn_indexes": [1, 2], **(high or {}),
        }
    )  # fmt: skip
    text = text or LlamaConfig(**{**_TEXT, "tie_word_embeddings": tied})
    config = DeepseekVLHybridConfig(
        vision_config=low, high_res_vision_config=sam, text_config=text, image_token_id=image, tie_word_embeddings=tied
    )  # fmt: skip
    one = made(DeepseekVLHybridForConditionalGeneration, config)
    one.save_pretrained = functools.partial(_publish, one, files=HYBRID_FILES)  # type: ignore[method-assign]
    return one


def _publish(model: PreTrainedModel, directory: Path, files: Any = None, **keys: Any) -> None:
    type(model).save_pretrained(model, directory, **keys)
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(files or DEEPSEEK_FILES, indent=2))


def _saved(make: Callable[[], PreTrainedModel], directory: Path) -> Path:
    make().save_pretrained(directory)
    return directory


def deepseek_vl_hub(directory: Path) -> Path:
    """The names of the hub's files, whose config.json says nothing of the head."""
    deepseek_vl().save_pretrained(directory)
    state = {
        name.replace("model.vision_model.", "model.vision_model.vision_model."): value
        for name, value in load(directory).items()
    }
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    tree = json.loads(path.read_text())
    del tree["tie_word_embeddings"]
    path.write_text(json.dumps(tree))
    return directory


# Longer names first; Transformers' conversion (convert_deepseek_vl_weights_to_hf.py @ 0100af8d) has the same pairs.
_ORIGINAL = (
    ("model.vision_model.embeddings.position_embedding.weight", "vision_model.vision_tower.pos_embed"),
    ("model.vision_model.embeddings.patch_embedding", "vision_model.vision_tower.patch_embed.proj"),
    ("model.vision_model.encoder.layers.", "vision_model.vision_tower.blocks."),
    ("model.vision_model.post_layernorm", "vision_model.vision_tower.norm"),
    ("model.aligner.linear1", "aligner.layers.0"),
    ("model.aligner.linear2", "aligner.layers.2"),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    (".self_attn.out_proj.", ".attn.proj."),
    (".self_attn.", ".attn."),
    (".layer_norm", ".norm"),
)


def deepseek_vl_original(directory: Path) -> Path:
    """As its authors write it: timm's tower, with a pooling head that is not used, and their config.json."""
    one = deepseek_vl()
    state: State = {}
    for name, value in one.state_dict().items():
        tower = "vision_model" in name
        for theirs, original in _ORIGINAL:
            if tower or not theirs.startswith("."):
                name = name.replace(theirs, original)
        state[name] = value[None] if name.endswith("pos_embed") else value
    for name in [key for key in state if ".attn.q_proj." in key]:
        parts = [state.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        state[name.replace("q_proj", "qkv")] = torch.cat(parts)
    state["vision_model.vision_tower.attn_pool.latent"] = torch.randn(1, 1, 48)
    state["vision_model.vision_tower.attn_pool.q.weight"] = torch.randn(48, 48)
    text = one.config.text_config.to_dict()
    language = {key: text[key] for key in (
        "hidden_size", "intermediate_size", "max_position_embeddings", "model_type", "num_attention_heads",
        "num_hidden_layers", "num_key_value_heads", "vocab_size",
    )}  # fmt: skip
    params = {"image_size": SIDE, "model_name": "siglip_tiny_patch7_28", "select_feature": "same", "select_layer": -1}
    aligner = {"depth": 2, "input_dim": 48, "n_embed": 64, "projector_type": "mlp_gelu"}
    config = {
        "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": aligner},
        "architectures": ["MultiModalityCausalLM"],
        "language_config": language,
        "model_type": "multi_modality",
        "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": params},
    }
    return write(directory, state, config, **{"preprocessor_config.json": json.dumps(ORIGINAL_FILES)})


def write_deepseek(directory: Path) -> Tokenizer:
    """Byte-level BPE with a BOS in front, and the tokens of DeepSeek-VL's conversations."""
    path = write_qwen2(directory)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (BEGIN, END, PLACEHOLDER)])
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    tokenizer.save(str(path))
    named = {"image_token": PLACEHOLDER}
    config = {"bos_token": BEGIN, "eos_token": END, "extra_special_tokens": named, "model_max_length": 16384}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
    )
    return tokenizer


# What Transformers' conversion writes, in fewer words: nothing stands behind a picture.
CHAT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.\n\n"
    "{% for message in messages %}{{ message['role'].capitalize() }}: {% for one in message['content'] %}"
    "{{ '<image_placeholder>' if one['type'] == 'image' else one['text'] }}{% endfor %}"
    "{{ '\n\n' if message['role'] == 'user' else '" + END + "' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def deepseek_answers(directory: Path, make: Any = None, processor: str = "DeepseekVLProcessor") -> Path:
    """With tokenizer, template and processor."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = write_deepseek(directory)
    text = LlamaConfig(**{**_TEXT, "vocab_size": tokenizer.get_vocab_size(), "tie_word_embeddings": False})
    (make or deepseek_vl)(text, image=tokenizer.token_to_id(PLACEHOLDER)).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(CHAT)
    own = {"num_image_tokens": 16, "processor_class": processor}
    (directory / "processor_config.json").write_text(json.dumps(own))
    return directory


DEEPSEEK = {
    "deepseek_vl": ("deepseek_vl", functools.partial(_saved, deepseek_vl)),
    "deepseek_vl_tied": ("deepseek_vl", functools.partial(_saved, functools.partial(deepseek_vl, tied=True))),
    "deepseek_vl_hub": ("deepseek_vl", deepseek_vl_hub),
    "deepseek_vl_original": ("deepseek_vl_original", deepseek_vl_original),
    "deepseek_vl_hybrid": ("deepseek_vl_hybrid", functools.partial(_saved, deepseek_hybrid)),
    "deepseek_vl_hybrid_tied": (
        "deepseek_vl_hybrid", functools.partial(_saved, functools.partial(deepseek_hybrid, tied=True)),
    ),
}  # fmt: skip
"""Checkpoints: family, and what writes them."""
