"""Tiny MoE-LLaVAs, written out: Transformers has no class for them.

The layer is DeepSpeed's ``MoE`` with its gate of two experts (``top2gating`` of deepspeedai/DeepSpeed,
``deepspeed/moe/sharded_moe.py`` @ 0c691a52) without what is random or drops tokens: a softmax over all experts in fp32,
the best two, their scores divided by their sum (at least what fp32 tells from 0 beside 1). It stands
in the place of the MLP of every second layer, the first among them (``moe_mode`` sparse), of Transformers' StableLM or
Phi; tower, projector and the rest are LLaVA's (:mod:`llava_like_models`), under the names of PKU-YuanGroup/MoE-LLaVA
``moellava/model/llava_arch.py`` and ``multimodal_projector/builder.py`` @ 24bcef9d.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from llava_like_models import EPOCH, LikeSource, LlavaLike, _clip, _plain, _siglip, phi_text
from tokenizer_files import write_qwen2
from torch import Tensor, nn

EXPERTS = 4


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


class MoeLlava(LlavaLike):
    """With its names of tower and projector; its ``siglip_encoder.py`` @ 33afc0d drops SigLIP's first patch."""

    def _encode(self, pixels: Tensor) -> Tensor:
        hidden: Tensor = self.tower[0](pixels, output_hidden_states=True).hidden_states[self.layer]
        return hidden[:, 1:]

    def published(self, name: str) -> str:
        """Return what the public checkpoints call a parameter."""
        tower, own = "model.vision_tower.vision_tower.", "model.image_tower.image_tower.vision_model."
        if name.startswith(tower):
            return own + name.removeprefix(tower).removeprefix("vision_model.")
        return name.replace("model.mm_projector.", "model.mm_projector.image_spatial_proj.", 1)

    def _config(self) -> dict[str, Any]:
        told = super()._config()
        told["mm_image_tower"], told["image_projector_type"] = (
            told.pop("mm_vision_tower"),
            told.pop("mm_projector_type"),
        )
        return told


def moe_llava(kind: str = "stablelm", wide: Any = None) -> MoeLlava:
    """On StableLM-2 (``siglip``: with that tower), or on Phi-2, whose experts have biases and whose head has none."""
    siglip, kind = kind == "siglip", "stablelm" if kind == "siglip" else kind
    text = phi_text(bias=False, **(wide or {})) if kind == "phi" else _plain(kind, wide)
    layers = text.model.layers
    here = list(range(0, len(layers), 2))
    for layer in here:
        layers[layer].mlp = DeepspeedMoE(layers[layer].mlp, text.config.hidden_size, EXPERTS, layer)
    name = {"stablelm": "MoELLaVAStablelmForCausalLM", "phi": "MoELLaVAPhiForCausalLM"}[kind]
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
    f"moe_llava_{kind}": ("moe_llava", partial(_saved, kind)) for kind in ("stablelm", "phi", "siglip")
}
"""What makes a checkpoint, by name, and its family."""
SOURCES = {kind: LikeSource("moe_llava", partial(moe_llava, kind)) for kind in ("stablelm", "phi", "siglip")}


def moe_llava_answers(directory: Path) -> Path:
    """Write one with a tokenizer that has the tokens of its template."""
    moe_llava("stablelm", wide={"vocab_size": 448}).save_pretrained(directory)
    write_qwen2(directory)
    return directory
