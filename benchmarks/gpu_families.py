"""Slices of families for ``gpu_check``: one GPU's part of models that are of other kinds than the 14B's.

A slice has the model's own widths and tower, and as many language layers as fit; a smaller vocabulary leaves them the
room. ``small`` is a tiny model of the same kind, for the dry run on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from megavlm.config.schema import Recipe


@dataclass(frozen=True)
class Slice:
    """One GPU's part of a family."""

    title: str
    model: dict[str, Any]
    """The recipe's model branch, but for the number of layers."""
    small: dict[str, Any]
    """The same kind, tiny."""
    layer_gib: float
    """Memory of a layer in training: 18 bytes a parameter."""
    base_gib: float
    """Of tower, vocabulary, logits and CUDA."""
    most: int
    """Layers that are enough to time."""
    every: int = 1
    """Layers come in groups of so many."""
    pictures: tuple[tuple[int, int], ...] = ((448, 448), (896, 448), (336, 672))
    """Width and height of the pictures that samples show in turn."""
    words: tuple[int, int] = (60, 300)
    """Least and most tokens of text in a sample."""

    def layers(self, memory_gib: float) -> int:
        """Return how many language layers fit; 0 where there is no room for any."""
        fitting = int((0.9 * memory_gib - self.base_gib) / self.layer_gib)
        return max(0, min(self.most, fitting)) // self.every * self.every

    def branch(self, layers: int, *, small: bool) -> dict[str, Any]:
        """Return the model branch with so many layers."""
        tree = self.small if small else self.model
        language = {**tree["language"], "num_layers": layers}
        if self.every > 1:  # one of each group attends to pictures
            language["cross_attention_layers"] = list(range(self.every // 2, layers, self.every))
        return {**tree, "language": language}


_TEXT = {
    "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 16,
    "vocab_size": 512, "max_position_embeddings": 2048,
}  # fmt: skip
_EYE = {"hidden_size": 48, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 96}
_FIXED = {"image_size": 32, "patch_size": 8, "positional_grid": 4, **_EYE}
_NATIVE = {"preset": "qwen2_5_vl_vit", "patch_size": 4, "window_size": 24, "full_attention_layers": [1], **_EYE}
_NATIVE |= {"image_size": 32}
_FEW = {"vocab_size": 32768}
SLICES: dict[str, Slice] = {
    "native": Slice(
        "Qwen2.5-VL-7B slice",
        {"preset": "qwen2_5_vl_7b", "language": _FEW},
        {
            "preset": "tiny", "vision": _NATIVE, "connector": {"preset": "patch_merger", "normalization": "RMSNorm"},
            "language": {**_TEXT, "rotary_sections": [2, 3, 3]},
            "image": {"kind": "native", "min_pixels": 64, "max_pixels": 1024},
        },
        layer_gib=4.0, base_gib=17.0, most=8,
    ),
    "experts": Slice(
        "Qwen3-VL-30B-A3B slice (experts)",
        {"preset": "qwen3_vl_30b_a3b", "language": _FEW},
        {
            "preset": "tiny", "vision": _FIXED, "connector": {"preset": "linear"},
            "language": {
                **_TEXT, "preset": "qwen3_235b_a22b", "num_moe_experts": 4, "moe_router_topk": 2,
                "moe_ffn_hidden_size": 32,
            },
        },
        layer_gib=11.0, base_gib=15.0, most=4,
    ),
    "cross": Slice(
        "Llama-3.2-Vision-11B slice (attention to pictures)",
        {"preset": "llama3_2_vision_11b", "language": {"vocab_size": 32768, "output_vocab_size": 32760}},
        {
            "preset": "tiny",
            "vision": {
                **_EYE, "preset": "mllama_vit", "image_size": 28, "patch_size": 14, "num_global_layers": 1,
                "intermediate_layers": [1],
            },
            "connector": {"preset": "linear"},
            "language": {**_TEXT, "preset": "llama", "output_vocab_size": 504},
            "image": {"kind": "canvas_tiles", "resample": "bilinear"},
        },
        layer_gib=3.8, base_gib=22.0, most=4, every=4, words=(400, 900),
    ),
    "visual expert": Slice(
        "CogVLM slice (visual expert)",
        {"preset": "cogvlm_chat", "language": {}},
        {
            "preset": "tiny", "vision": _FIXED, "connector": {"preset": "linear"},
            "language": {**_TEXT, "preset": "llama", "visual_expert": True, "image_positions": "shared"},
        },
        layer_gib=7.0, base_gib=26.0, most=4,
    ),
    "prefix": Slice(
        "PaliGemma-3B slice (prefix)",
        {"preset": "paligemma_3b_224", "language": _FEW},
        {
            "preset": "tiny", "vision": _FIXED, "connector": {"preset": "linear"},
            "language": {**_TEXT, "preset": "gemma", "attention_mask": "prefix"},
        },
        layer_gib=2.0, base_gib=14.0, most=8,
    ),
    "mamba": Slice(
        "Cobra-3B slice (Mamba)",
        {"preset": "cobra_3b", "language": _FEW},
        {
            "preset": "tiny", "vision": _FIXED, "connector": {"preset": "linear"},
            "language": {
                "preset": "mamba", "hidden_size": 64, "intermediate_size": 96, "time_step_rank": 5, "state_size": 4,
                "vocab_size": 512,
            },
        },
        layer_gib=0.8, base_gib=14.0, most=8,
    ),
    "features": Slice(
        "CogAgent slice (attention to features beside text)",
        {"preset": "cogagent_chat", "language": {}},
        {
            "preset": "tiny",
            "vision": {
                **_FIXED, "preset": "eva02_pair", "high_image_size": 64, "high_patch_size": 8, "high_hidden_size": 24,
                "high_num_layers": 1, "high_num_attention_heads": 2, "high_ffn_hidden_size": 48,
                "high_positional_grid": 8, "high_to": "layers",
            },
            "connector": {"preset": "glu", "ffn_hidden_size": 96},
            "language": {
                **_TEXT, "preset": "llama", "visual_expert": True, "image_positions": "shared", "cross_hidden_size": 24,
                "cross_compute_hidden_size": 32,
            },
            "image": {"kind": "squash_pair"},
        },
        layer_gib=7.3, base_gib=30.0, most=4,
    ),
    "codes": Slice(
        "Chameleon-7B slice (pictures as tokens)",
        {"preset": "chameleon_7b", "language": {}},
        {
            "preset": None,
            "vision": {
                "preset": "chameleon_vq_gan", "image_size": 8, "base_width": 32, "width_multipliers": [1, 1, 2],
                "blocks_per_level": 1, "latent_width": 16, "code_width": 24, "num_codes": 40,
            },
            "connector": {"preset": "codes"},
            "language": {**_TEXT, "preset": "chameleon_7b", "image_tokens": [120, 160]},
            "image": {"kind": "squash"},
        },
        layer_gib=3.8, base_gib=20.0, most=4, words=(200, 600),
    ),
    "encoder and decoder": Slice(
        "PaLI-3 slice (encoder, decoder, biases by distance)",
        {"preset": "pali3_5b", "language": {}},
        {
            "preset": "tiny", "vision": _FIXED, "connector": {"preset": "linear"},
            "language": {
                "preset": "tiny_t5", "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4,
                "kv_channels": 16, "vocab_size": 512,
            },
        },
        layer_gib=2.1, base_gib=16.0, most=8,
    ),
}  # fmt: skip


def size_of(job: dict[str, Any]) -> dict[str, Any]:
    """Return model branch, pack length and packs of a step of a job that names a slice."""
    small = job.get("small", False)
    model = SLICES[job["slice"]].branch(job["layers"], small=small)
    return {"model": model, "sequence_length": 128 if small else 2048, "packs": 2 if small else 4}


def family_batches(recipe: Recipe, job: dict[str, Any], image_token: int, *, steps: int, seed: int) -> list[list[Any]]:
    """Return the micro-batches of different steps, on the device: samples of a picture and some text, by its plan."""
    import torch

    from megavlm.data.batch import IGNORE_INDEX
    from megavlm.data.chat import EncodedSample
    from megavlm.data.device_batch import context_length, make_batch
    from megavlm.data.media import arrange, plan_of
    from megavlm.data.packing import PackableSample, build_pack
    from megavlm.data.positions import positions_of
    from megavlm.data.spans import spans_of
    from megavlm.parallel.device import local_device

    plan, room = plan_of(recipe.model), recipe.data.sequence_length
    own, spans = positions_of(recipe.model, image_token), spans_of(recipe.model, image_token)
    rng, words = np.random.default_rng(seed), (24, 48) if job.get("small") else SLICES[job["slice"]].words
    sizes = SLICES[job["slice"]].pictures
    first_code, codes = getattr(recipe.model.language, "picture_tokens", None) or (0, 0)
    if job.get("small"):
        sizes = tuple((width // 14, height // 14) for width, height in sizes)

    def pack(first: int) -> tuple[Any, Any, Any]:
        samples, pixels, left = [], [], room
        while True:
            layout = plan.plan(*sizes[(first + len(samples)) % len(sizes)], 1)
            text = int(rng.integers(*words))
            if layout.tokens + text > left:
                break
            written = rng.integers(0, image_token // 2, text)
            written[(written >= first_code) & (written < codes)] = 0  # pictures alone are written with these
            tokens = np.concatenate([np.full(layout.tokens, image_token), written])
            labels = np.where(np.arange(len(tokens)) < layout.tokens + text // 3, IGNORE_INDEX, tokens)
            encoded = EncodedSample(tokens.astype(np.int64), labels.astype(np.int64), 1)
            rows = plan.pixels_of(layout)[0]
            samples.append(
                PackableSample(encoded, (b"",), str(len(samples)), 0, shapes=(layout.shape,), views=len(layout.views))
            )
            pixels.append(rng.integers(0, 256, (rows, *plan.row), dtype=np.uint8))
            left -= len(tokens)
        made = build_pack(samples, room, 0, plan, own, spans)
        return made, torch.from_numpy(np.concatenate(pixels)), arrange(plan, made.layouts(plan) or [])

    found = []
    for _ in range(steps):
        made = [pack(number) for number in range(recipe.training.global_batch_size)]
        length = context_length(one.cu_seqlens for one, _, _ in made)
        found.append([make_batch(one, shown, local_device(), how, length=length) for one, shown, how in made])
    return found
