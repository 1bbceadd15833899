"""Vision towers. One line here and one module with ``build`` add another."""

from megavlm.models.registry import VISION

_QWEN_VIT = "megavlm.models.vision.qwen_vit"

# Qwen-VL's tower (OpenCLIP ViT-bigG without class token): facts page B; arXiv 2308.12966.
VISION.register(
    "openclip_vit_bigg",
    _QWEN_VIT,
    image_size=448,
    patch_size=14,
    hidden_size=1664,
    num_layers=48,
    num_attention_heads=16,
    ffn_hidden_size=8192,
    positional_grid=16,
)
VISION.register(
    "tiny_vit",
    _QWEN_VIT,
    image_size=64,
    patch_size=8,
    hidden_size=96,
    num_layers=3,
    num_attention_heads=4,
    ffn_hidden_size=384,
    positional_grid=8,
    init_method_std=0.1,  # about 1 / sqrt(width): with 0.02, so narrow a tower passes little on and learns late
)
