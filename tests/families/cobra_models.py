"""Tiny Cobra: what its code (h-zhao1997/cobra @ 97f91e13, ``cobra/models``) does, with Transformers' classes as parts.

Towers are Transformers' DINOv2 with registers, without a position of the class token, and SigLIP: both are taken in
front of their last layer (``dinosiglip_vit.py``), and saved by timm's names. Between them and the Mamba is
``FusedMLPProjector`` of ``util/nn_utils.py``; ``vlms/cobra.py`` puts features in front of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from family_cases import made
from minigpt_models import MiniGPTSource
from PIL import Image
from safetensors.torch import save_file
from spliced_models import IMAGE, filled
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    MambaConfig,
    MambaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from whole import Shown
from whole_source import TransformersSource, photographs, with_slots

from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of

COLOURS = (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3))
SIDE, PATCH, VOCAB = 30, 7, 120
_SIGLIP = (
    ("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers.", "blocks."), ("layer_norm", "norm"),
    ("self_attn.out_proj", "attn.proj"), ("post_layernorm", "norm"), ("head.", "attn_pool."),
)  # fmt: skip
_DINO = (
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("embeddings.cls_token", "cls_token"),
    ("embeddings.register_tokens", "reg_token"), ("encoder.layer.", "blocks."), ("layernorm", "norm"),
    ("attention.o_proj", "attn.proj"), ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
)  # fmt: skip


class Cobra(nn.Module):
    """The whole model, for one sample at a time.

    Args:
        heads: of either tower.
        inner: channels of Mamba's mixers, in widths.
    """

    base_model_prefix = ""

    def __init__(self, heads: tuple[int, int] = (2, 2), expand: int = 2) -> None:
        super().__init__()
        low, high = 64 * heads[0], 72 * heads[1]
        self.dino: Any = made(
            Dinov2WithRegistersModel,
            Dinov2WithRegistersConfig(
                hidden_size=low, num_hidden_layers=3, num_attention_heads=heads[0], mlp_ratio=1, image_size=5 * PATCH,
                patch_size=PATCH,
            ),
        )  # fmt: skip
        self.siglip: Any = made(
            SiglipVisionModel,
            SiglipVisionConfig(
                hidden_size=high, intermediate_size=high // 2, num_hidden_layers=4, num_attention_heads=heads[1],
                image_size=SIDE, patch_size=PATCH, hidden_act="gelu_pytorch_tanh",
            ),
        )  # fmt: skip
        for tower in (self.dino, self.siglip):
            filled(tower, 7)
        with torch.no_grad():
            self.dino.embeddings.position_embeddings[:, 0] = 0
        width, wide = 64, 4 * (low + high)
        self.projector = filled(
            nn.Sequential(nn.Linear(low + high, wide), nn.GELU(), nn.Linear(wide, width), nn.GELU(),
                          nn.Linear(width, width)), 8
        )  # fmt: skip
        keys = {"hidden_size": width, "num_hidden_layers": 4, "state_size": 8, "time_step_rank": 5, "expand": expand}
        self.mamba: Any = made(MambaForCausalLM, MambaConfig(**keys, vocab_size=VOCAB, pad_token_id=0, eos_token_id=1))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Return [N, P, E] of [N, 2, 3, side, side]: of each picture DINOv2's pixels, and SigLIP's."""
        low = self.dino(pixel_values[:, 0], output_hidden_states=True).hidden_states[-2][:, 5:]
        high = self.siglip(pixel_values[:, 1], output_hidden_states=True).hidden_states[-2]
        found: Tensor = self.projector(torch.cat([low, high], dim=2))
        return found

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, **_: Any) -> SimpleNamespace:
        """Return ``logits`` [1, S, V]; an answer may have the token of a slot, which then is a word like any other."""
        words = self.mamba.get_input_embeddings()(input_ids)
        if pixel_values is not None and len(pixel_values):
            features = self.get_image_features(pixel_values).flatten(0, 1)
            slots = (input_ids[0] == IMAGE).nonzero().squeeze(1)[: len(features)]
            assert len(slots) == len(features)
            words = words.index_copy(1, slots, features[None])
        return SimpleNamespace(logits=self.mamba(inputs_embeds=words, use_cache=False).logits)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **given: Any) -> Tensor:
        """Choose the best token, and begin anew: no cache."""
        for _ in range(max_new_tokens):
            best = self(input_ids, given.get("pixel_values")).logits[:, -1].argmax(-1)
            input_ids = torch.cat([input_ids, best[:, None]], 1)
        return input_ids

    def by_checkpoint(self, value: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        """Return what ``value`` gives of each parameter, by the names of a checkpoint; None is left out."""
        found = {name: one for name, p in self.named_parameters() if (one := value(p)) is not None}
        return {
            **timm("dino_featurizer/", _DINO, {n[5:]: v for n, v in found.items() if n[:5] == "dino."}),
            **timm("siglip_featurizer/", _SIGLIP,
                   {re.sub(r"^siglip\.(vision_model\.)?", "", n): v for n, v in found.items() if n[:7] == "siglip."}),
            **{f"trained/projector.{n}": v for n, v in found.items() if n[:10] == "projector."},
            **{
                f"trained/llm_backbone.llm.{n.removeprefix('mamba.').replace('embeddings', 'embedding')}": v
                for n, v in found.items()
                if n[:6] == "mamba."
            },
        }  # fmt: skip

    def save_pretrained(self, directory: Path) -> Path:
        """Write it as its code, and timm, do."""
        (directory / "checkpoints").mkdir(parents=True)
        pieces: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.by_checkpoint(lambda p: p.detach()).items():
            piece, _, own = name.partition("/")
            pieces.setdefault(piece, {})[own] = tensor.clone().contiguous()
        trained = pieces.pop("trained")
        trained["llm_backbone.llm.lm_head.weight"] = trained["llm_backbone.llm.backbone.embedding.weight"].clone()
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in trained.items():
            part, _, own = name.partition(".")
            parts.setdefault(part, {})[own] = tensor
        torch.save({"model": parts}, directory / "checkpoints" / "latest-checkpoint.pt")
        for piece, state in pieces.items():
            (directory / piece).mkdir()
            save_file(state, directory / piece / "model.safetensors")
        model = {
            "model_id": "cobra+3b", "arch_specifier": "no-align+fused-gelu-mlp",
            "image_resize_strategy": "resize-naive", "vision_backbone_id": f"dinosiglip-vit-so-{SIDE}px",
            "llm_backbone_id": "mamba-2.8b-zephyr", "llm_max_length": 2048,
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps({"model": model, "stage": "finetune", "seed": 7}))
        return directory


def timm(top: str, names: tuple[tuple[str, str], ...], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a tower's tensors by timm's names: queries, keys and values are one."""
    found: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if "mask_token" in name:
            continue
        if name == "embeddings.position_embeddings":  # the class token's is none
            found[f"{top}pos_embed"] = tensor[:, 1:]
            continue
        if name == "embeddings.position_embedding.weight":
            found[f"{top}pos_embed"] = tensor[None]
            continue
        part = re.fullmatch(r"(.*\.)(?:self_attn|attention)\.(q_proj|k_proj|v_proj)\.(\w+)",
                            name)  # fmt: skip
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        if part is None:
            found[top + name] = tensor
            continue
        where = part[1]
        for ours, theirs in names:
            where = where.replace(ours, theirs)
        fused.setdefault(f"{top}{where}attn.qkv.{part[3]}", {})[part[2][0]] = tensor
    return found | {name: torch.cat([parts[one] for one in "qkv"]) for name, parts in fused.items()}


class CobraSource(MiniGPTSource):
    """One of these as a source of parity."""

    def __init__(self, make: Callable[[], Cobra] = Cobra) -> None:
        TransformersSource.__init__(self, "cobra", make, vocab=VOCAB, image=IMAGE)  # type: ignore[arg-type]

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Squash pictures as timm's transforms with ``resize-naive`` do: bicubic, each tower's mean and deviation."""
        plan = plan_of(model)
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        ids = with_slots(layouts, self.image, self.vocab, words)
        squares = [one.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for one in (photographs(sizes) if sizes else ())]
        raw = [torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in squares]
        colours = [[torch.tensor(one).view(3, 1, 1) for one in pair] for pair in COLOURS]
        pairs = [[(one - mean) / std for mean, std in colours] for one in raw]
        pixels = torch.stack([torch.stack(pair) for pair in pairs]) if pairs else torch.zeros(0, 2, 3, SIDE, SIDE)
        heights = torch.tensor([[h, w] for w, h in sizes]) if sizes else torch.zeros(0, 2, dtype=torch.long)
        return Shown(ids, {"pixel_values": pixels} if sizes else {}, pixels.flatten(1), heights, layouts)

    def gradients(self) -> dict[str, Tensor]:
        """Return those that there are, by the names of a checkpoint."""
        return self.model.by_checkpoint(lambda p: p.grad)


def save(path: Path) -> Path:
    """Write a checkpoint."""
    return Cobra().save_pretrained(path)


COBRA: dict[str, tuple[str, Callable[[Path], Path]]] = {"cobra": ("cobra", save)}
"""Checkpoints, with their family."""
