"""Tiny LLaVA-OneVision-1.5s, written out: Transformers has no class for it.

The definition is that of EvolvingLMMs-Lab/LLaVA-OneVision-1.5, ``ds/llavaonevision1_5/modeling_llavaonevision1_5.py``:
RICE (:class:`packed_cases.Rice`, each picture alone), a merger, and what is Qwen3 line by line, for which
NVIDIA-NeMo/Automodel (``models/llava_onevision``) takes Transformers' Qwen3Model; so does this file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from family_cases import made
from packed_cases import FFN, HEADS, LAYERS, PATCH, WIDTH, Rice
from qwen2_vl_models import PREPROCESSOR
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

IMAGE, VOCAB, EMBED = 119, 128, 64
FILES = {**PREPROCESSOR, "image_processor_type": "Qwen2VLImageProcessor", "temporal_patch_size": 1}
"""``preprocessor_config.json``."""


class Tower(Rice):
    """RICE and its merger."""

    def __init__(self) -> None:
        super().__init__()
        wide = 4 * WIDTH
        merger = {
            "ln_q": nn.LayerNorm(WIDTH, eps=1e-5),
            "mlp": nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, EMBED)),
        }
        self.merger = nn.ModuleDict(merger)

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        """Return [P / 4, E]."""
        features = self.merger["ln_q"](super().forward(patches, grid))
        merged: Tensor = self.merger["mlp"](features.reshape(-1, 4 * WIDTH))
        return merged


class LlavaOnevision15(nn.Module):
    """The whole model, for one sample at a time."""

    def __init__(self, *, tied: bool = False, **text: Any) -> None:
        super().__init__()
        told = {
            "hidden_size": EMBED, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 24, "vocab_size": VOCAB, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6, "rope_theta": 5000000.0, "tie_word_embeddings": tied, **text,
        }  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": told["rope_theta"]}
        own = Qwen3Config(**{key: value for key, value in told.items() if key != "rope_theta"}, rope_parameters=rope)
        torch.manual_seed(7)
        visual = Tower()
        with torch.no_grad():
            visual.class_embedding.normal_()
            visual.class_pos_emb.normal_()
            for parameter in visual.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        self.model = nn.ModuleDict({"visual": visual, "language_model": made(Qwen3Model, own)})
        self.lm_head = nn.Linear(EMBED, told["vocab_size"], bias=False)
        if tied:
            self.lm_head.weight = self.model["language_model"].embed_tokens.weight
        self.text = told
        # As transformers.PreTrainedModel has it, for whole_source.NativeSource and PEFT.
        sizes = SimpleNamespace(temporal_patch_size=1, patch_size=PATCH)
        self.config = SimpleNamespace(model_type="llavaonevision1_5", vision_config=sizes)

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Return [T, E]."""
        found: Tensor = self.model["visual"](pixel_values, image_grid_thw)
        return found

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None, **_: Tensor
    ) -> SimpleNamespace:
        """Return ``logits`` [1, S, V]; an answer may have the token of a slot, which then is a word like any other."""
        words = self.model["language_model"].embed_tokens(input_ids)
        if pixel_values is not None:
            assert image_grid_thw is not None
            features = self.get_image_features(pixel_values, image_grid_thw)
            slots = (input_ids[0] == IMAGE).nonzero().squeeze(1)[: len(features)]
            assert len(slots) == len(features)
            words = words.index_copy(1, slots, features[None])
        hidden = self.model["language_model"](inputs_embeds=words).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **given: Any) -> Tensor:
        """Choose the best token, and begin anew: no cache."""
        shown = {key: given[key] for key in ("pixel_values", "image_grid_thw") if key in given}
        for _ in range(max_new_tokens):
            best = self(input_ids, **shown).logits[:, -1].argmax(-1)
            input_ids = torch.cat([input_ids, best[:, None]], 1)
        return input_ids

    def prepare_inputs_for_generation(self, **given: Any) -> dict[str, Any]:
        """Return what :meth:`forward` takes; PEFT asks it of every causal language model."""
        return given

    def save_pretrained(self, directory: Path) -> None:
        """Write it with the keys and names of the hub."""
        directory.mkdir(parents=True, exist_ok=True)
        layers = self.text["num_hidden_layers"]
        text = {
            **self.text, "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
            "initializer_range": 0.02, "layer_types": ["full_attention"] * layers, "max_window_layers": layers,
            "model_type": "LLaVAOneVision1_5_text", "rope_scaling": None, "sliding_window": None, "use_cache": True,
            "use_sliding_window": False, "image_token_id": None, "video_token_id": None,
        }  # fmt: skip
        vision = {
            "depth": LAYERS, "embed_dim": WIDTH, "hidden_act": "gelu", "hidden_size": WIDTH, "in_channels": 3,
            "initializer_range": 0.02, "intermediate_size": FFN, "layer_norm_eps": 1e-05, "model_type": "rice_vit",
            "num_heads": HEADS, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 1,
            "text_hidden_size": EMBED,
        }  # fmt: skip
        code = "modeling_llavaonevision1_5.LLaVAOneVision1_5_ForConditionalGeneration"
        config = {
            "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
            "auto_map": {
                "AutoConfig": "configuration_llavaonevision1_5.Llavaonevision1_5Config",
                "AutoModel": code, "AutoModelForCausalLM": code,
            },
            "image_token_id": IMAGE, "model_type": "llavaonevision1_5", "text_config": text, "torch_dtype": "float32",
            "video_token_id": IMAGE + 1, "vision_config": vision, "vocab_size": self.text["vocab_size"],
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps(config, indent=2))
        (directory / "preprocessor_config.json").write_text(json.dumps(FILES, indent=2))
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        if self.text["tie_word_embeddings"]:
            del state["lm_head.weight"]
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def saved(directory: Path, **told: Any) -> Path:
    """Write one."""
    LlavaOnevision15(**told).save_pretrained(directory)
    return directory


RICE: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "llava_onevision1_5": ("llava_onevision1_5", saved),
    "llava_onevision1_5_tied": ("llava_onevision1_5", lambda directory: saved(directory, tied=True)),
}
"""What makes a checkpoint, by name, and its family."""
