"""Tiny MobileVLMs and DenseConnectors in their authors' layout; the connectors are ``reducer_reference.py``'s.

Names and keys: Meituan-AutoML/MobileVLM @ 7f5c81f1 (``mobilevlm/model/mobilellama.py``, ``vision_projector.py``), and
HJYao00/DenseConnector @ d7c8222f (``dc/model/llava_arch.py``, ``multimodal_projector/dense_connector.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from family_cases import _VISION
from reducer_reference import LDP, Dense, LDPv2
from spliced_models import Parts, Places, Spliced, filled, text_of
from torch import nn
from transformers import CLIPVisionConfig, PretrainedConfig, SiglipVisionConfig

_PLACES = Places(
    "model.vision_tower.vision_tower", "model.mm_projector", "", "model.vision_tower.vision_tower.vision_model."
)
WIDTH, EMBED = 48, 64


def _config(text: PretrainedConfig, **keys: Any) -> dict[str, Any]:
    return {
        **text.to_dict(), "freeze_mm_mlp_adapter": False, "image_aspect_ratio": "pad", "mm_hidden_size": WIDTH,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": "eyes", "torch_dtype": "float32", "use_mm_proj": True, **keys,
    }  # fmt: skip


class LDPNet(nn.Module):
    """``LDPNetProjector``."""

    def __init__(self, embed: int) -> None:
        super().__init__()
        self.model = LDP(WIDTH, embed, 16)  # 64 channels: a quarter

    def forward(self, x: Any) -> Any:
        return self.model(x)


def mobilevlm(version: int = 1, vision_keys: dict[str, Any] | None = None, **text: Any) -> Parts:
    """MobileVLM: v1 with 2 x 2 tokens of 4 x 4 patches, v2 with 12 x 12 of 14 x 14."""
    vision = CLIPVisionConfig(**_VISION | ({} if version == 1 else {"image_size": 98}) | (vision_keys or {}))
    connector = LDPNet(EMBED) if version == 1 else LDPv2(WIDTH, EMBED, 12)
    keys = {
        "architectures": ["MobileLlamaForCausalLM"], "model_type": "mobilevlm", "vision_tower_type": "clip",
        "mm_projector_type": "ldpnet" if version == 1 else "ldpnetv2",
    }  # fmt: skip
    return Parts(
        text_of("llama", rms_norm_eps=1e-6, max_position_embeddings=2048, **text), vision, filled(connector), _PLACES,
        lambda one, _: _config(one, **keys), files={"vision_config.json": vision.to_dict()},
    )  # fmt: skip


def dense(kind: str = "dci", *, clip: bool = False, **text: Any) -> Parts:
    """DenseConnector behind a SigLIP of 5 layers, or of 17 where layers 7 and 15 are taken."""
    layers = 6 if kind == "dci" else 18
    vision = (CLIPVisionConfig if clip else SiglipVisionConfig)(**_VISION | {"num_hidden_layers": layers})
    taken = list(range(layers)) if kind == "dci" else [layers - 1, 7, 15]
    connector = Dense(WIDTH, EMBED, kind, len(taken))
    keys = {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "mm_dense_connector_type": kind,
        "mm_hidden_size": WIDTH * (1 if kind == "sti" else 3), "mm_projector_type": "mlp2x_gelu",
        "unfreeze_mm_vision_tower": True,
    }  # fmt: skip
    return Parts(
        text_of("llama", rms_norm_eps=1e-5, num_key_value_heads=2, **text), vision, filled(connector), _PLACES,
        lambda one, _: _config(one, **keys), layers=taken, drops=clip, files={"vision_config.json": vision.to_dict()},
        registered=connector.projector,
    )  # fmt: skip


def _saved(parts: Callable[..., Parts], *words: Any, **keys: Any) -> Callable[[Path], Path]:
    return lambda path: Spliced(parts(*words, **keys)).save_pretrained(path)


CONNECTORS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "mobilevlm": ("mobilevlm", _saved(mobilevlm)),
    "mobilevlm_v2": ("mobilevlm", _saved(mobilevlm, 2)),
    "dense_connector": ("dense_connector", _saved(dense)),
    "dense_connector_sci": ("dense_connector", _saved(dense, "sci", clip=True)),
    "dense_connector_sti": ("dense_connector", _saved(dense, "sti")),
}
"""Checkpoints, with their family."""
