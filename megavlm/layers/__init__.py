"""Layers: attention on packs, norms, activations, linears, rotary angles, LoRA, NF4; ``specs`` picks them."""
