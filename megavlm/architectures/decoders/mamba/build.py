"""Mamba language models on Megatron-Core's GPTModel: mixers stand where attention does, and there is no MLP."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.architectures.adapters import adapted_linears
from megavlm.architectures.context import BuildContext
from megavlm.architectures.decoders.decoder.build import mask_padding, padded_vocab_size
from megavlm.architectures.decoders.mamba.config import MambaConfig
from megavlm.layers.specs import block_submodules, mamba_modules


def transformer_config(language: MambaConfig, context: BuildContext) -> TransformerConfig:
    """Return the TransformerConfig of the language model, which also steers the pipeline schedule."""
    return context.language_config(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        # There are no heads and no MLP, but Megatron-Core's class asks for them.
        num_attention_heads=context.parallel.tensor_model_parallel_size,
        kv_channels=1,
        ffn_hidden_size=language.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_epsilon,
        add_bias_linear=False,
        init_method_std=language.init_method_std,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
    )


def build(
    language: MambaConfig,
    context: BuildContext,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> GPTModel:
    """Build the chunk of this pipeline stage (the function that every module of this folder has).

    Args:
        language: the recipe's ``model.language`` branch.
        context: layout, number type, layer implementation.
        pre_process: the chunk holds the embedding.
        post_process: the chunk holds the final norm and the output layer.
        vp_stage: index of the chunk on its stage, with a virtual pipeline.
    """
    config = transformer_config(language, context)
    layer = mamba_modules(
        transformer_engine=context.transformer_engine,
        linears=adapted_linears(language, context.lora),
        sizes={
            "channels": language.intermediate_size,
            "state_size": language.state_size,
            "time_step_rank": language.time_step_rank,
            "taps": language.conv_kernel,
        },
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=block_submodules([layer] * get_num_layers_to_build(config, vp_stage)),
        vocab_size=padded_vocab_size(language, context),
        max_sequence_length=language.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=language.tie_word_embeddings,
        position_embedding_type="none",
        # Image features are spliced in first; then the model scatters the sequence itself.
        scatter_embedding_sequence_parallel=False,
        vp_stage=vp_stage,
    )
    if post_process:
        mask_padding(model, language.output_rows)
    return model
