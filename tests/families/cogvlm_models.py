"""Tiny CogVLMs, written out: Transformers has no class for them.

Written from the published definition: ``visual.py`` and ``modeling_cogvlm.py`` beside the weights of
THUDM/cogvlm-chat-hf (``EVA2CLIPModel``, ``build_position_ids``, ``get_expert_mask``, ``build_conversation_input_ids``;
a copy of the second with its history, of CogVLM2: github.com/Niky-san/cogvlm2_surce @ 7982d39e). The language half is
:mod:`expert_reference`'s, under the published names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from expert_reference import CogLanguage, expert_mask, positions
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from whole import Shown
from whole_source import photographs, with_slots

from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of

IMAGE, VOCAB, SIDE, PATCH, LAYERS = 119, 120, 28, 7, 4
_VECTORS = ("boi", "eoi", "pos_embed", "cls_token")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class TowerLayer(nn.Module):
    """A norm behind attention and one behind the MLP, whose names are those of norms in front."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.input_layernorm = nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.ModuleDict(
            {"query_key_value": nn.Linear(width, 3 * width), "dense": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.post_attention_layernorm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, T, W]."""
        qkv = self.attention["query_key_value"](x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + self.input_layernorm(self.attention["dense"](seen))
        return x + self.post_attention_layernorm(self.mlp["fc2"](F.gelu(self.mlp["fc1"](x))))


class Embedding(nn.Module):
    """Patches, a class token in front of them, and a row of the table for each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)
        self.cls_embedding = nn.Parameter(torch.zeros(1, width))
        self.position_embedding = nn.Embedding((SIDE // PATCH) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [N, T, W]."""
        x = self.proj(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_embedding.expand(len(x), -1, -1), x], dim=1) + self.position_embedding.weight


class Projection(nn.Module):
    """``GLU``."""

    def __init__(self, width: int, embed: int, inner: int) -> None:
        super().__init__()
        self.linear_proj = nn.Linear(width, embed, bias=False)
        self.norm1 = nn.LayerNorm(embed)
        self.dense_h_to_4h = nn.Linear(embed, inner, bias=False)
        self.gate_proj = nn.Linear(embed, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, embed, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., E]."""
        x = F.gelu(self.norm1(self.linear_proj(x)))
        found: Tensor = self.dense_4h_to_h(F.silu(self.gate_proj(x)) * self.dense_h_to_4h(x))
        return found


class Eyes(nn.Module):
    """``EVA2CLIPModel``: tower, connector, and what stands around a picture."""

    def __init__(self, width: int, layers: int, heads: int, tower: int, embed: int, inner: int) -> None:
        super().__init__()
        self.patch_embedding = Embedding(width)
        self.transformer = nn.ModuleDict(
            {"layers": nn.ModuleList(TowerLayer(width, heads, tower) for _ in range(layers))}
        )
        self.linear_proj = Projection(width, embed, inner)
        self.boi = nn.Parameter(torch.zeros(1, 1, embed))
        self.eoi = nn.Parameter(torch.zeros(1, 1, embed))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [N, P + 2, E]."""
        x = self.patch_embedding(pixels)
        for layer in self.transformer["layers"]:
            x = layer(x)
        x = self.linear_proj(x[:, 1:])
        return torch.cat([self.boi.expand(len(x), -1, -1), x, self.eoi.expand(len(x), -1, -1)], dim=1)


def common_settings(embed: int, ffn: int, layers: int, version: str) -> dict[str, Any]:
    """Return the keys of config.json that both generations of the code have."""
    return {
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": embed,
        "initializer_range": 0.02, "intermediate_size": ffn, "max_position_embeddings": 2048,
        "num_attention_heads": 4, "num_hidden_layers": layers, "pad_token_id": 0, "rms_norm_eps": 1e-6,
        "template_version": version, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.35.0", "use_cache": True, "vocab_size": VOCAB,
    }  # fmt: skip


def eyes_settings(width: int, heads: int, inner: int) -> dict[str, Any]:
    """Return ``vision_config``."""
    return {
        "dropout_prob": 0.0, "hidden_act": "gelu", "hidden_size": width, "image_size": SIDE, "in_channels": 3,
        "intermediate_size": inner, "layer_norm_eps": 1e-6, "num_heads": heads, "num_hidden_layers": 3,
        "num_positions": (SIDE // PATCH) ** 2 + 1, "patch_size": PATCH,
    }  # fmt: skip


class CogVLM(nn.Module):
    """``CogVLMForCausalLM``, for one sample at a time."""

    files: tuple[str, ...] = ("modeling_cogvlm.py", "visual.py", "configuration_cogvlm.py")

    def __init__(self, *, heads: int = 4, inner: int = 96, width: int = 48, version: str = "chat") -> None:
        super().__init__()
        embed, ffn, layers = 64, 96, LAYERS
        text = CogLanguage(VOCAB, embed, layers, 4, ffn)
        self.model, self.lm_head = text.model, text.lm_head
        self.model.vision = Eyes(width, 3, heads, inner, embed, ffn)
        self.fill()
        self.settings = {
            "_name_or_path": "cogvlm-chat-v1.1", "architectures": ["CogVLMForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_cogvlm.CogVLMConfig",
                "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
            },
            **common_settings(embed, ffn, layers, version),
            "vision_config": eyes_settings(width, heads, inner),
        }  # fmt: skip
        self.config = SimpleNamespace(model_type="cogvlm", tie_word_embeddings=False)

    def fill(self) -> None:
        """Give it random weights."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "norm" in name:
                    parameter.copy_(noise * 0.1 + float("weight" in name))
                elif parameter.dim() < 2 or "embedding" in name or name.endswith(_VECTORS):
                    parameter.copy_(noise * 0.5)
                else:
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, slots: int = 0) -> Tensor:
        """Return [S, V]; the first ``slots`` tokens of a picture are pictures, those of an answer are words."""
        ids = input_ids
        places = (ids == IMAGE).nonzero().squeeze(1)[:slots]
        types = torch.zeros_like(ids).index_fill(0, places, 1)
        x = self.model.embed_tokens(ids)
        if slots:
            assert pixel_values is not None
            x = x.index_copy(0, places, self.model.vision(pixel_values).flatten(0, 1))
        mask, at = expert_mask(types), positions(types)
        for layer in self.model.layers:
            x = layer(x, mask, at)
        found: Tensor = self.lm_head(self.model.norm(x))
        return found

    def prepare_inputs_for_generation(self, **given: Any) -> dict[str, Any]:
        """Return what it is given; PEFT asks for it of every causal language model."""
        return given

    def save_pretrained(self, directory: Path) -> Path:
        """Write it with the keys and names of the hub."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.settings, indent=2))
        for name in self.files:
            (directory / name).write_text("raise SystemExit('remote code must not run')\n")
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return directory


class CogSource:
    """One of these models, for :mod:`whole_source`."""

    style = ""
    image = IMAGE
    unused = tuple(
        f"language.decoder.layers.{LAYERS - 1}.{name}.vision.weight"
        for name in ("self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    )
    """Of image tokens, whose last layer nothing looks at, and which have no labels."""

    def __init__(self, make: Callable[[], CogVLM]) -> None:
        self._make = make
        self._model: CogVLM | None = None

    @property
    def model(self) -> CogVLM:
        """The model, made when it is asked for."""
        if self._model is None:
            self._model = self._make()
        return self._model

    def save(self, directory: Path) -> None:
        """Write it."""
        self.model.save_pretrained(directory)

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Squash pictures as the published transform does: bicubic, to the tower's square, CLIP's numbers."""
        plan = plan_of(model)
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        ids = with_slots(layouts, IMAGE, VOCAB, words)
        pixels = torch.zeros(0, 3, SIDE, SIDE)
        if sizes:
            squares = [one.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for one in photographs(sizes)]
            views = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in squares])
            mean, std = (torch.tensor(one).view(3, 1, 1) for one in (MEAN, STD))
            pixels = (views - mean) / std
        heights = torch.tensor([[h, w] for w, h in sizes]) if sizes else torch.zeros(0, 2, dtype=torch.long)
        given: dict[str, Any] = {"pixel_values": pixels}
        return Shown(ids, given, pixels, heights, layouts)

    def features(self, sample: Shown) -> Tensor:
        """Encode."""
        with torch.no_grad():
            found: Tensor = self.model.model.vision(sample.views).flatten(0, 1)
        return found

    def _run(self, ids: Tensor, sample: Shown) -> Tensor:
        found: Tensor = self.model(ids, sample.views, sum(layout.tokens for layout in sample.layouts))
        return found

    def logits(self, sample: Shown) -> Tensor:
        """Run the model once."""
        return self._run(sample.ids, sample)

    def gradients(self) -> dict[str, Tensor]:
        """Return those that there are."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    @torch.no_grad()
    def answer(self, sample: Shown, tokens: int) -> list[int]:
        """Choose the best token, and begin anew: no cache."""
        ids = sample.ids
        for _ in range(tokens):
            ids = torch.cat([ids, self._run(ids, sample)[-1:].argmax(-1)])
        return list(ids[len(sample.ids) :].tolist())


def _saved(make: Callable[[], CogVLM]) -> Callable[[Path], Path]:
    return lambda directory: make().save_pretrained(directory)


COGVLM: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "cogvlm": ("cogvlm", _saved(CogVLM)),
    "cogvlm_base": ("cogvlm", _saved(lambda: CogVLM(version="base"))),
}
"""What makes a checkpoint, by name, and its family."""
