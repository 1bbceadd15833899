"""Names of a Mamba's weights in published checkpoints, and which of its layers adapters may stand beside."""

from __future__ import annotations

from megavlm.architectures.decoders.mamba.config import MambaConfig
from megavlm.config.lora import Target
from megavlm.weights.rules import Aside, Table, both, row
from megavlm.weights.targets import targets_in

MAMBA_LANGUAGE = Table(
    part="language",
    ours="decoder.layers.{}.",
    theirs="{model}layers.{}.",
    layer=(
        row("input_layernorm.weight", "norm.weight"),
        row("self_attention.in_proj.weight", "mixer.in_proj.weight"),  # what is mixed above, its gate below
        *both("self_attention.conv1d", "mixer.conv1d"),
        row("self_attention.x_proj.weight", "mixer.x_proj.weight"),
        *both("self_attention.dt_proj", "mixer.dt_proj"),
        row("self_attention.ssm.A_log", "mixer.A_log"),
        row("self_attention.ssm.D", "mixer.D"),
        row("self_attention.out_proj.weight", "mixer.out_proj.weight"),
    ),
    rest=(
        row("embedding.word_embeddings.weight", "{model}{embedding}.weight"),
        row("decoder.final_layernorm.weight", "{model}norm_f.weight"),
        row("output_layer.weight", "{head}weight"),
    ),
    aside=(Aside(r"{head}weight", "tied output layer, written out", same_as=r"{model}{embedding}.weight"),),
    names={"model": "backbone.", "head": "lm_head.", "embedding": "embeddings"},
)
"""Mamba, as Transformers has it (state-spaces/mamba-*-hf); state-spaces' own code says ``embedding``."""


def targets(language: MambaConfig) -> tuple[Target, ...]:
    """Return what ``lora.targets`` may name."""
    return targets_in(MAMBA_LANGUAGE)
