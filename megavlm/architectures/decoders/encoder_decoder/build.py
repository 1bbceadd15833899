"""Encoder-decoder language models on Megatron-Core's GPTModel, whose block of layers has the encoder's in it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.architectures.context import BuildContext
from megavlm.architectures.decoders.decoder.build import mask_padding, padded_vocab_size
from megavlm.architectures.decoders.encoder_decoder.config import EncoderDecoderConfig
from megavlm.layers.activation import GeGLUMLP, gelu_tanh
from megavlm.layers.encoder_decoder import EncoderDecoderBlock
from megavlm.layers.specs import block_submodules, stack_modules
from megavlm.parallel.device import has_kernels


def transformer_config(language: EncoderDecoderConfig, context: BuildContext) -> TransformerConfig:
    """Return the TransformerConfig of both stacks, which also steers the schedule."""
    silu = language.activation == "silu"
    return context.language_config(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_attention_heads,
        kv_channels=language.kv_channels,
        softmax_scale=1.0,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu if silu else gelu_tanh,
        add_bias_linear=False,
        init_method_std=language.init_method_std,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        use_te_activation_func=silu and not has_kernels(),
    )


def build(
    language: EncoderDecoderConfig,
    context: BuildContext,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> GPTModel:
    """Build the model (the function that every module of this folder has).

    Args:
        language: the recipe's ``model.language`` branch.
        context: layout, number type, layer implementation.
        pre_process: true: there is one stage.
        post_process: true.
        vp_stage: None.
    """
    assert pre_process and post_process and vp_stage is None, "the rules refuse a pipeline"
    config = transformer_config(language, context)
    layers = {
        decodes: block_submodules(
            [stack_modules(decodes=decodes, transformer_engine=context.transformer_engine)] * language.num_layers
        )
        for decodes in (False, True)
    }
    model = GPTModel(
        config=config,
        transformer_layer_spec=layers[True],
        vocab_size=padded_vocab_size(language, context),
        max_sequence_length=language.max_position_embeddings,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="none",
        # Image features are spliced in first; then the model scatters the sequence itself.
        scatter_embedding_sequence_parallel=False,
    )
    encoder = TransformerBlock(config=config, spec=layers[False])
    EncoderDecoderBlock.take_over(model.decoder, encoder, language.relative_buckets, language.relative_farthest)
    for layer in (*encoder.layers, *model.decoder.layers):
        if language.activation != "silu":
            GeGLUMLP.take_over(layer.mlp)
        if context.initialize:
            _scale_queries(layer, language.kv_channels)
    mask_padding(model, language.output_rows)
    return model


@torch.no_grad()
def _scale_queries(layer: Any, width: int) -> None:
    """Divide what makes queries, as their products with keys are not (T5 draws them so)."""
    weight = layer.self_attention.linear_qkv.weight
    weight.view(-1, 3, width, weight.size(1))[:, 0].div_(width**0.5)
    if hasattr(layer.cross_attention, "linear_q"):
        layer.cross_attention.linear_q.weight.div_(width**0.5)
