"""Tiny InternVLs: by Transformers, and the same as their authors write them."""

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
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from whole_source import experts_apart


def internvl_files() -> dict[str, Any]:
    """``preprocessor_config.json`` as OpenGVLab/InternVL3-8B-hf has it, for tiles of 28 pixels."""
    return {
        "crop_to_patches": False, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406], "image_processor_type": "GotOcr2ImageProcessor",
        "image_std": [0.229, 0.224, 0.225], "max_patches": 12, "min_patches": 1, "resample": 3,
        "rescale_factor": 1 / 255, "size": {"height": 28, "width": 28},
    }  # fmt: skip


def _publish(model: PreTrainedModel, directory: Path, **keys: Any) -> None:
    type(model).save_pretrained(model, directory, **keys)
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(internvl_files(), indent=2))


def internvl(text: PretrainedConfig | None = None, *, tied: bool = False, **vision: Any) -> PreTrainedModel:
    """InternVL of InternViT-300M's kind and Qwen2."""
    tower = InternVLVisionConfig(**{**_VISION, "attention_bias": True, **vision})
    config = InternVLConfig(
        vision_config=tower, text_config=text or Qwen2Config(**_TEXT, tie_word_embeddings=tied), image_token_id=119,
        image_seq_length=4, tie_word_embeddings=tied,
    )  # fmt: skip
    one = made(InternVLForConditionalGeneration, config)
    embeddings = one.model.vision_tower.embeddings
    with torch.no_grad():  # Transformers starts them at 0
        for parameter in (embeddings.cls_token, embeddings.position_embeddings):
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    one.save_pretrained = functools.partial(_publish, one)  # type: ignore[method-assign]
    return one


def internvl_answers(hf: Path) -> Path:
    """InternVL with a tokenizer that has its tokens; its processor cannot be made without torchvision."""
    hf.mkdir()
    file = write_qwen2(hf)
    tree = json.loads(file.read_text())
    first = 1 + max([*tree["model"]["vocab"].values(), *(token["id"] for token in tree["added_tokens"])])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    names = ("<img>", "</img>", "<IMG_CONTEXT>")
    tree["added_tokens"] += [
        {"id": first + i, "content": name, **flags, "special": True} for i, name in enumerate(names)
    ]
    file.write_text(json.dumps(tree))
    model = internvl(Qwen2Config(**{**_TEXT, "vocab_size": first + 3, "eos_token_id": 2}))
    model.config.image_token_id = first + 2
    model.save_pretrained(hf)
    return hf


def internvl_6b() -> PreTrainedModel:
    """InternVL of InternViT-6B's kind and Qwen3."""
    kind = {"attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm"}
    return internvl(Qwen3Config(**_TEXT, head_dim=32, tie_word_embeddings=False), **kind)


def internvl_moe() -> PreTrainedModel:
    """InternVL3.5-30B-A3B's kind: InternViT-300M's and Qwen3-MoE."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return internvl(Qwen3MoeConfig(**_TEXT, **experts, head_dim=32, tie_word_embeddings=False))


def internvl_chat_moe(directory: Path) -> Path:
    """The same as its authors write it: each expert by itself, as Transformers saves it too."""
    internvl_chat(directory, internvl_moe())
    path = directory / "config.json"
    state = {name: value.clone() for name, value in experts_apart(load(directory)).items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    tree = json.loads(path.read_text())
    tree["llm_config"]["num_experts"] = tree["llm_config"].pop("num_local_experts")  # as Transformers 4 does
    path.write_text(json.dumps(tree))
    return directory


def internvl_uneven() -> PreTrainedModel:
    """The same with five heads, as InternViT-6B has 25: no tensor-parallel size but 1 and 5 divides them."""
    kind = {"attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm"}
    sizes = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 75}
    return internvl(Qwen3Config(**_TEXT, head_dim=32, tie_word_embeddings=False), **kind, **sizes)


_ORIGINAL_INTERNVL = (
    # Longer names first; github.com/OpenGVLab/InternVL, internvl_chat/internvl/model/*/modeling_*.py.
    ("model.vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    ("model.vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
    ("model.vision_tower.embeddings.patch_embeddings.projection", "vision_model.embeddings.patch_embedding"),
    ("model.vision_tower.encoder.layer.", "vision_model.encoder.layers."),
    ("model.multi_modal_projector.layer_norm", "mlp1.0"),
    ("model.multi_modal_projector.linear_1", "mlp1.1"),
    ("model.multi_modal_projector.linear_2", "mlp1.3"),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.projection_layer.", ".attn.proj."),
    (".attention.", ".attn."),
    (".lambda_1", ".ls1"),
    (".lambda_2", ".ls2"),
)


def internvl_chat(directory: Path, model: PreTrainedModel | None = None) -> Path:
    """InternVL as its authors write it: q, k and v of the tower in one matrix, its own config.json."""
    one = model or internvl_6b()
    state: State = {}
    for name, value in one.state_dict().items():
        for theirs, original in _ORIGINAL_INTERNVL:
            if "vision" in name or not theirs.startswith("."):
                name = name.replace(theirs, original)
        state[name] = value
    for name in [key for key in state if ".attn.q_proj." in key]:
        parts = [state.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        state[name.replace("q_proj", "qkv")] = torch.cat(parts)
    vision, text = one.config.vision_config, one.config.text_config.to_dict()
    text["rope_scaling"] = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}  # as the published ones
    rope = text.pop("rope_parameters")
    config = {
        "architectures": ["InternVLChatModel"], "downsample_ratio": 0.5, "dynamic_image_size": True,
        "force_image_size": 28, "llm_config": {**text, "rope_theta": rope["rope_theta"]}, "max_dynamic_patch": 12,
        "min_dynamic_patch": 1, "model_type": "internvl_chat", "ps_version": "v2", "select_layer": -1,
        "template": "internvl2_5", "use_thumbnail": True,
        "vision_config": {
            "hidden_act": "gelu", "hidden_size": vision.hidden_size, "image_size": 28, "initializer_factor": 0.1,
            "intermediate_size": vision.intermediate_size, "layer_norm_eps": 1e-6, "model_type": "intern_vit_6b",
            "norm_type": vision.norm_type, "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_hidden_layers, "patch_size": 7, "qk_normalization": vision.use_qk_norm,
            "qkv_bias": vision.attention_bias,
        },
    }  # fmt: skip
    return write(directory, state, config, **{"added_tokens.json": json.dumps({"<IMG_CONTEXT>": 119})})


def internvl_modules(directory: Path) -> Path:
    """InternVL by the names of Transformers' modules, as its authors' script writes it."""
    one = internvl()
    one.save_pretrained(directory)
    state = {name: value.contiguous() for name, value in one.state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def saved(model: Callable[[], PreTrainedModel]) -> Callable[[Path], Path]:
    """Return what saves a model of Transformers."""

    def save(directory: Path) -> Path:
        model().save_pretrained(directory)
        return directory

    return save


def intern_vit(directory: Path) -> Path:
    """The tower alone, as its authors write it."""
    internvl_chat(directory)
    state, tree = load(directory), json.loads((directory / "config.json").read_text())
    own = {key.removeprefix("vision_model."): value for key, value in state.items() if key.startswith("vision_model.")}
    save_file(own, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(tree["vision_config"]))
    (directory / "added_tokens.json").unlink()
    return directory


INTERNVL: dict[str, Callable[[Path], Path]] = {
    "internvl": saved(internvl), "internvl_6b": saved(internvl_6b), "internvl_modules": internvl_modules,
    "internvl_chat": internvl_chat, "intern_vit": intern_vit, "internvl_moe": saved(internvl_moe),
    "internvl_chat_moe": internvl_chat_moe,
}  # fmt: skip
"""What makes a checkpoint, by name."""
