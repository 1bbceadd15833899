"""Tiny MoE-LLaVAs, written out: Transformers has no class for them.

The layer is DeepSpeed's ``MoE`` with its gate of two experts (``top2gating`` of deepspeedai/DeepSpeed,
``deepspeed/moe/sharded_moe.py`` @ 0c691a52) without what is random or drops tokens: a softmax over all experts in fp32,
the best two, their scores divided by their sum (at least what fp32 tells from 0 beside 1). It stands
in the place of the MLP of every second layer, the first among them (``moe_mode`` sparse), of Transformers' StableLM or
Phi, or of Qwen v1 (``language_model/qwen/modeling_qwen.py`` there; its layers are :mod:`vary_models`'); tower,
projector and the rest are LLaVA's (:mod:`llava_like_models`), under the names of PKU-YuanGroup/MoE-LLaVA
``moellava/model/llava_arch.py`` and ``multimodal_projector/builder.py`` @ 24bcef9d.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from family_cases import _TEXT
from llava_like_models import EPOCH, LikeSource, LlavaLike, _clip, _plain, _siglip, phi_text
from tokenizer_files import write_qwen2
from torch import Tensor, nn
from vary_models import QwenBlock, RMSNorm

EXPERTS = 4
KINDS = ("stablelm", "phi", "siglip", "qwen")
_CLASSES = {"stablelm": "Stablelm", "phi": "Phi", "qwen": "QWen"}


class DeepspeedMoE(nn.Module):
    """[.., S, H] to the same; of two experts a token."""

    def __init__(self, mlp: nn.Module, hidden: int, experts: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        copies = [copy.deepcopy(mlp) for _ in range(experts)]
        with torch.no_grad():
            for parameter in (p for one in copies for p in one.parameters()):  # as a training left them
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        gate = nn.ModuleDict({"wg": nn.Linear(hidden, experts, bias=False)})
        with torch.no_grad():
            gate["wg"].weight.copy_(torch.randn(experts, hidden, generator=generator) * 0.3)
        inner = nn.ModuleDict({"deepspeed_experts": nn.ModuleList(copies)})
        self.deepspeed_moe = nn.ModuleDict({"gate": gate, "experts": inner})

    def forward(self, x: Tensor) -> Tensor:
        """Weigh what the two say."""
        tokens = x.reshape(-1, x.size(-1))
        gates = self.deepspeed_moe["gate"]["wg"](tokens.float()).softmax(1)  # type: ignore[index]
        first = gates.argmax(1, keepdim=True)
        second = gates.scatter(1, first, float("-inf")).argmax(1, keepdim=True)
        both = torch.cat([first, second], 1)
        chosen = gates.gather(1, both)
        weights = chosen / chosen.sum(1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).eps)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.deepspeed_moe["experts"]["deepspeed_experts"]):  # type: ignore[index]
            share = (weights * (both == number)).sum(1, keepdim=True)
            sent = (share > 0).squeeze(1)
            out = out.index_add(0, sent.nonzero().squeeze(1), expert(tokens[sent]) * share[sent].to(x.dtype))
        return out.view_as(x)


class _QwenModel(nn.Module):
    """``QWenModel``; the two that LLaVA's code asks for have other names."""

    def __init__(self, keys: dict[str, Any]) -> None:
        super().__init__()
        embed, heads, inner = (keys[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size"))
        self.wte = nn.Embedding(keys["vocab_size"], embed)
        self.h = nn.ModuleList(QwenBlock(embed, heads, inner // 2) for _ in range(keys["num_hidden_layers"]))
        self.ln_f = RMSNorm(embed)

    @property
    def embed_tokens(self) -> nn.Embedding:
        """Return the embedding."""
        return self.wte

    @property
    def layers(self) -> nn.ModuleList:
        """Return the layers."""
        return self.h


class QwenText(nn.Module):
    """``QWenLMHeadModel``, for one sample at a time, with the keys of its ``config.json``."""

    def __init__(self, keys: dict[str, Any]) -> None:
        super().__init__()
        self.model = _QwenModel(keys)
        self.lm_head = nn.Linear(keys["hidden_size"], keys["vocab_size"], bias=False)
        self.config = SimpleNamespace(hidden_size=keys["hidden_size"], to_dict=lambda: dict(keys))

    def forward(self, input_ids: Tensor) -> Any:
        """Return ``logits`` [1, S, V]."""
        x = self.model.wte(input_ids[0])
        for block in self.model.h:
            x = block(x)
        return SimpleNamespace(logits=self.lm_head(self.model.ln_f(x))[None])


def _qwen(wide: dict[str, Any] | None = None) -> QwenText:
    text = {**_TEXT, **(wide or {})}
    keys = {
        **{key: text[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")},
        "intermediate_size": 2 * text["intermediate_size"], "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0,
        "bf16": True, "fp16": False, "fp32": False, "initializer_range": 0.02, "kv_channels": 16,
        "layer_norm_epsilon": 1e-6, "max_position_embeddings": 8192, "no_bias": True, "rotary_emb_base": 10000,
        "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 8192, "tie_word_embeddings": False,
        "use_cache": True, "use_dynamic_ntk": True, "use_flash_attn": False, "use_logn_attn": True,
    }  # fmt: skip
    one, generator = QwenText(keys), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in one.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise * 0.1 if parameter.dim() < 2 else noise * parameter[0].numel() ** -0.5)
    return one


class MoeLlava(LlavaLike):
    """With its names of tower and projector; its ``siglip_encoder.py`` @ 33afc0d drops SigLIP's first patch."""

    def _encode(self, pixels: Tensor) -> Tensor:
        hidden: Tensor = self.tower[0](pixels, output_hidden_states=True).hidden_states[self.layer]
        return hidden[:, 1:]

    def published(self, name: str) -> str:
        """Return what the public checkpoints call a parameter."""
        tower, own = "model.vision_tower.vision_tower.", "model.image_tower.image_tower.vision_model."
        if name.startswith(tower):
            name = own + name.removeprefix(tower).removeprefix("vision_model.")
        name = name.replace("model.mm_projector.", "model.mm_projector.image_spatial_proj.", 1)
        return name.replace("model.", "transformer.", 1) if self.on_qwen and name.startswith("model.") else name

    @property
    def on_qwen(self) -> bool:
        """Whether the language model is Qwen v1."""
        return isinstance(self.text[0], QwenText)

    def _config(self) -> dict[str, Any]:
        told = super()._config()
        told["mm_image_tower"], told["image_projector_type"] = (
            told.pop("mm_vision_tower"),
            told.pop("mm_projector_type"),
        )
        return told


def moe_llava(kind: str = "stablelm", wide: Any = None) -> MoeLlava:
    """On StableLM-2 (``siglip``: with that tower), on Qwen v1, or on Phi-2, whose experts have biases."""
    siglip, kind = kind == "siglip", "stablelm" if kind == "siglip" else kind
    if kind == "qwen":
        text: Any = _qwen(wide)
    else:
        text = phi_text(bias=False, **(wide or {})) if kind == "phi" else _plain(kind, wide)
    layers = text.model.layers
    here = list(range(0, len(layers), 2))
    for layer in here:
        layers[layer].mlp = DeepspeedMoE(layers[layer].mlp, text.config.hidden_size, EXPERTS, layer)
    name = f"MoELLaVA{_CLASSES[kind]}ForCausalLM"
    moe = {
        "capacity_factor": 1.5, "ep_size": 1, "eval_capacity_factor": 2.0, "min_capacity": 0, "moe_enable": True,
        "moe_layers_idx": here, "moe_mode": "sparse", "num_experts": [EXPERTS] * len(here),
        "router_aux_loss_coef": 0.01, "top_k_experts": 2, "train_modules": ["wg"], "use_residual": False,
    }  # fmt: skip
    keys = {
        "model_type": f"moe_llava_{kind}", "architectures": [name], "image_aspect_ratio": "pad", "moe": moe,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "mm_video_tower": None, "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": False, "use_mm_proj": True,
    }  # fmt: skip
    return MoeLlava(text, _siglip() if siglip else _clip(), keys, renamed=EPOCH if kind == "stablelm" else {})


def _saved(kind: str, directory: Path) -> Path:
    moe_llava(kind).save_pretrained(directory)
    return directory


MOE_LLAVA: dict[str, tuple[str, Callable[[Path], Path]]] = {
    f"moe_llava_{kind}": ("moe_llava", partial(_saved, kind)) for kind in KINDS
}
"""What makes a checkpoint, by name, and its family."""
SOURCES = {kind: LikeSource("moe_llava", partial(moe_llava, kind)) for kind in KINDS}


def moe_llava_answers(directory: Path) -> Path:
    """Write one with a tokenizer that has the tokens of its template."""
    moe_llava("stablelm", wide={"vocab_size": 448}).save_pretrained(directory)
    write_qwen2(directory)
    return directory
