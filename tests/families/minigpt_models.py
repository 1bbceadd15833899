"""Tiny MiniGPT-4 and MiniGPT-v2: what their code (Vision-CAIR/MiniGPT-4 @ d94738a7, ``minigpt4/models``) does.

The tower is written out from ``eva_vit.py`` (EVA01-g as BLIP-2 has it), the Q-Former and the language model are
Transformers' classes, what lies between is ``encode_img`` of ``minigpt4.py`` and ``minigpt_v2.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from family_cases import CLIP_MEAN, CLIP_STD, made
from PIL import Image
from spliced_models import IMAGE, filled, text_of
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, LlamaForCausalLM
from whole import Lack, Published, Shown, Stage, WholeFamily
from whole_source import TransformersSource, photographs, with_slots

from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of

PATCH = 7


class EvaAttention(nn.Module):
    """Attention whose keys have no bias, and the others one apart from the weight of all three."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.qkv(x) + bias).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EvaBlock(nn.Module):
    def __init__(self, width: int, heads: int, inside: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = EvaAttention(width, heads), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, inside), nn.Linear(inside, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class EvaTower(nn.Module):
    """All features, the class token's first; the table is stretched to the picture's grid."""

    def __init__(self, heads: int, grid: int, layers: int = 2, inside: int = 60, patch: int = PATCH) -> None:
        super().__init__()
        width = 88 * heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid**2 + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(EvaBlock(width, heads, inside) for _ in range(layers))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixels)
        side, grid = x.size(-1), int((self.pos_embed.size(1) - 1) ** 0.5)
        table = self.pos_embed[:, 1:]
        if side != grid:
            squared = table.transpose(1, 2).unflatten(-1, (grid, grid))
            table = F.interpolate(squared, (side, side), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        x = x.flatten(2).transpose(1, 2) + table
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


@dataclass(frozen=True)
class Sizes:
    """Of a tiny model."""

    queries: int | None = None
    """Of the Q-Former; None for four patches side by side."""
    heads: int = 2
    grid: int = 4
    """Of the tower's table; pictures are of 28 pixels, and so 4 x 4 patches."""
    groups: int = 2
    vocab: int = 120
    settings: Mapping[str, Any] | None = None
    """What the trainer put beside what was trained."""
    lora: int | None = None
    """Rank of adapters in the file."""
    norm: bool = True
    """Whether the norm behind the tower is in a file."""
    projection: bool = True


class MiniGPT(nn.Module):
    """The whole model, for one sample at a time."""

    base_model_prefix = ""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = 88 * sizes.heads
        self.visual_encoder = filled(EvaTower(sizes.heads, sizes.grid), 4)
        self.ln_vision = filled(nn.LayerNorm(width), 5)  # torch's own epsilon, 1e-5
        if sizes.queries is not None:
            config = Blip2QFormerConfig(
                hidden_size=256, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                encoder_hidden_size=width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )  # fmt: skip
            self.Qformer = filled(Blip2QFormerModel(config), 6)
            self.query_tokens = nn.Parameter(torch.randn(1, sizes.queries, 256))
        self.llama_proj = filled(nn.Linear(4 * width if sizes.queries is None else 256, 64), 7)
        text = text_of("llama", vocab_size=sizes.vocab, num_key_value_heads=sizes.groups, rms_norm_eps=1e-5)
        self.llama_model = made(LlamaForCausalLM, text)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Return [N, T, E]."""
        features = self.ln_vision(self.visual_encoder(pixel_values))
        if self.sizes.queries is None:
            features = features[:, 1:]
            merged = features.reshape(len(features), features.size(1) // 4, -1)
        else:
            queries = self.query_tokens.expand(len(features), -1, -1)
            merged = self.Qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        found: Tensor = self.llama_proj(merged)
        return found

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, **_: Any) -> SimpleNamespace:
        """Return ``logits`` [1, S, V]; an answer may have the token of a slot, which then is a word like any other."""
        words = self.llama_model.get_input_embeddings()(input_ids)
        if pixel_values is not None and len(pixel_values):
            features = self.get_image_features(pixel_values).flatten(0, 1)
            slots = (input_ids[0] == IMAGE).nonzero().squeeze(1)[: len(features)]
            assert len(slots) == len(features)
            words = words.index_copy(1, slots, features[None])
        return SimpleNamespace(logits=self.llama_model(inputs_embeds=words).logits)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **given: Any) -> Tensor:
        """Choose the best token, and begin anew: no cache."""
        for _ in range(max_new_tokens):
            best = self(input_ids, given.get("pixel_values")).logits[:, -1].argmax(-1)
            input_ids = torch.cat([input_ids, best[:, None]], 1)
        return input_ids

    def named(self, name: str) -> str:
        """Return what a checkpoint calls a parameter: its file, and the name in there."""
        if name.startswith("visual_encoder."):
            return "eva_vit_g/" + name.removeprefix("visual_encoder.")
        if name.startswith("llama_model."):
            return "llm/" + name.removeprefix("llama_model.")
        name = name.replace("Qformer.layernorm", "Qformer.embeddings.LayerNorm").replace("Qformer.", "Qformer.bert.")
        name = re.sub(r"\.((cross)?attention)\.attention\.", r".\1.self.", name)
        behind = name.startswith("llama_proj") or self.sizes.queries is None
        return ("minigpt/" if behind else "blip2/") + name

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of each file."""
        found: dict[str, dict[str, Tensor]] = {"minigpt": {}}
        for name, value in self.state_dict().items():
            file, _, own = self.named(name).partition("/")
            if file != "llm":
                found.setdefault(file, {})[own] = value
        if not self.sizes.norm:
            found["minigpt"] = {name: one for name, one in found["minigpt"].items() if "ln_vision" not in name}
        if self.sizes.queries is not None:  # BLIP-2's file has more than is taken
            found["blip2"] |= {
                "Qformer.bert.embeddings.position_ids": torch.arange(8)[None],
                "Qformer.bert.encoder.layer.0.output.dense.bias": torch.randn(5),
                "t5_proj.weight": torch.randn(3, 4),
            }
        found["minigpt"] |= self.adapters()
        return found

    def adapters(self) -> dict[str, Tensor]:
        """Return the tensors of adapters on queries and values, as PEFT 0.2 calls them."""
        rank, found = self.sizes.lora, {}
        for i, layer in enumerate(self.llama_model.model.layers if rank else ()):
            for part in ("q_proj", "v_proj"):
                out, into = getattr(layer.self_attn, part).weight.shape
                name = f"llama_model.base_model.model.model.layers.{i}.self_attn.{part}.lora_"
                generator = torch.Generator().manual_seed(out + i)
                found[f"{name}A.weight"] = torch.randn(rank, into, generator=generator) / 8
                found[f"{name}B.weight"] = torch.randn(out, rank, generator=generator) / 8
        return found

    def save_pretrained(self, directory: Path) -> Path:
        """Write all files."""
        self.llama_model.save_pretrained(directory / "llm")
        files, names = self.files(), {"blip2": "blip2_pretrained_flant5xxl", "minigpt": "pretrained_minigpt"}
        torch.save(files.pop("eva_vit_g"), directory / "eva_vit_g.pth")
        for file, state in files.items():
            told = {"config": {"model": dict(self.sizes.settings)}, "epoch": 3} if self.sizes.settings else {}
            if file != "minigpt" or self.sizes.projection:
                torch.save({"model": state, **told}, directory / f"{names[file]}.pth")
        return directory


class MiniGPTSource(TransformersSource):
    """One of these as a source of parity."""

    def __init__(self, family: str, sizes: Sizes) -> None:
        super().__init__(family, lambda: MiniGPT(sizes), vocab=120, image=IMAGE)  # type: ignore[arg-type, return-value]

    def save(self, directory: Path) -> None:
        """Write it."""
        self.model.save_pretrained(directory)

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Squash pictures as ``blip_processors.py`` does: bicubic, CLIP's mean and deviation."""
        plan, side = plan_of(model), model.vision.image_size
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        ids = with_slots(layouts, self.image, self.vocab, words)
        mean, std = (torch.tensor(one).view(3, 1, 1) for one in (CLIP_MEAN, CLIP_STD))
        squares = [one.resize((side, side), Image.Resampling.BICUBIC) for one in (photographs(sizes) if sizes else ())]
        views = [(torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 - mean) / std for one in squares]
        pixels = torch.stack(views) if views else torch.zeros(0, 3, side, side)
        heights = torch.tensor([[h, w] for w, h in sizes]) if sizes else torch.zeros(0, 2, dtype=torch.long)
        return Shown(ids, {"pixel_values": pixels} if sizes else {}, pixels, heights, layouts)

    def gradients(self) -> dict[str, Tensor]:
        """Return those that there are."""
        named = self.model.named
        return {named(name): p.grad for name, p in self.model.named_parameters() if p.grad is not None}


QUERIES = Sizes(queries=5)
V2 = Sizes(grid=2, settings={"arch": "minigpt_v2"})
LLAMA_2 = Sizes(settings={"arch": "minigpt4", "model_type": "pretrain_llama2"})
ADAPTED = replace(V2, settings=None, lora=4)


def save(sizes: Sizes) -> Callable[[Path], Path]:
    """Return what writes a checkpoint."""
    return lambda path: MiniGPT(sizes).save_pretrained(path)


MINIGPT: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "minigpt4": ("minigpt4", save(QUERIES)),
    "minigpt_v2": ("minigpt_v2", save(ADAPTED)),
    "minigpt4_llama_2": ("minigpt_v2", save(LLAMA_2)),
}
"""Checkpoints, with their family."""

_ADAM = (0.9, 0.999, 1e-8, 0)
_NO_CLASS = Lack("Transformers has no class for it: answers are held against the written-out one, in `source`")
_COUNTED = Lack("no class to build: counted from its parts in test_minigpt.py")
_ADAPTERS = Lack("adapters are those of llm/ alone, as of hpt; those in MiniGPT-v2's own file: test_minigpt.py")


def _stages(preset: str, tokens: int) -> dict[str, Stage]:
    """Return MiniGPT-4's two."""
    first = Stage(
        ("connector",), 1e-4, 20_000, 256, 2048, tokens, warmup=5000, decay=0.05, template="llava_plain", least=8e-5,
        adam=_ADAM,
    )  # fmt: skip
    second = replace(
        first, lr=3e-5, steps=1000, batch=12, after=f"{preset}/pretrain", warmup=200, template=None, least=1e-5
    )
    return {f"{preset}/pretrain": first, f"{preset}/sft": second}


def minigpt_rows(header: str, planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the rows of ``whole_rows.py``; arguments are what rows share."""
    first = Stage(
        ("connector", "language"), 1e-4, 400_000, 96, 2048, 256, warmup=1000, decay=0.05, least=1e-5, adam=_ADAM,
        lora=(64, 16),
    )  # fmt: skip
    second = replace(first, lr=1e-5, least=1e-6, steps=50_000, batch=64, after="minigpt_v2_7b/pretrain")
    shared: dict[str, Any] = {
        "image": {"kind": "squash"}, "answers": _NO_CLASS, "lora": _ADAPTERS, "built": _COUNTED, "headers": header,
        "planner": planner, "template": Lack("by tokenizer: test_minigpt.py"),
    }  # fmt: skip
    return {
        "minigpt4": WholeFamily(
            checkpoints=("minigpt4",),
            source=MiniGPTSource("minigpt4", QUERIES),
            uneven=MiniGPTSource("minigpt4", replace(QUERIES, heads=3, groups=1)),
            others=Lack("what is published differs in size alone"),
            presets={
                "minigpt4_7b": Published(7_832_625_024),
                "minigpt4_13b": Published(14_110_861_184),
            },
            recipes=_stages("minigpt4_7b", 32) | _stages("minigpt4_13b", 32),
            **shared,
        ),
        "minigpt_v2": WholeFamily(
            checkpoints=("minigpt_v2", "minigpt4_llama_2"),
            source=MiniGPTSource("minigpt_v2", V2),
            uneven=MiniGPTSource("minigpt_v2", replace(V2, heads=3, groups=1)),
            others={"minigpt-4 on llama 2": MiniGPTSource("minigpt_v2", LLAMA_2)},
            presets={"minigpt_v2_7b": Published(7_747_385_728), "minigpt4_llama_2_7b": Published(7_747_385_728)},
            recipes={
                **_stages("minigpt4_llama_2_7b", 64),
                "minigpt_v2_7b/pretrain": first,
                "minigpt_v2_7b/multitask": second,
                "minigpt_v2_7b/sft": replace(second, batch=24, after="minigpt_v2_7b/multitask"),
            },
            **shared,
        ),
    }
