"""Decoder-only language models on Megatron-Core's GPTModel: Llama, Qwen, Phi, Gemma, StableLM and their kin.

What tells them apart is data: kind of norm, biases, activation and gate, norms on queries and keys, key/value heads,
how much of a head is turned, attention and MLP one after the other or side by side, multipliers of embeddings, branches
and logits. GPTModel has no place for multipliers nor for a bias of its output layer: they are hung onto it here, as
hooks and a parameter, so that its forward pass stays its own.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megavlm.architectures.adapters import adapted_linears
from megavlm.architectures.context import BuildContext
from megavlm.architectures.decoders.decoder.config import BRANCH_EPSILON, DecoderConfig, with_all_keys
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig, ParallelConfig
from megavlm.layers.activation import BiasActivationMLP, GeGLUMLP, gelu_tanh
from megavlm.layers.latent import LatentHeads
from megavlm.layers.rotary import PackRotary, TwoRotaries, pair_axes
from megavlm.layers.scale import NormedSum
from megavlm.layers.specs import LayerKind, block_submodules, cross_modules, layer_modules
from megavlm.parallel.device import has_kernels

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh}


def transformer_config(language: DecoderConfig, context: BuildContext) -> TransformerConfig:
    """Return the TransformerConfig of the language model, which also steers the pipeline schedule."""
    parallel, off = context.parallel, dict[str, Any]()
    swiglu = language.gated_linear_unit and language.activation == "silu"
    if not swiglu:
        if context.engine.bias_activation_fusion == "on":
            raise UserError(
                "engine.bias_activation_fusion: on is for gated SiLU, and model.language.activation is"
                f" {language.activation}{'' if language.gated_linear_unit else ' without a gate'}; set it to auto"
            )
        off["bias_activation_fusion"] = False  # Megatron-Core's fused GELU is the tanh form under the exact one's name
    if language.use_parallel_residual and context.engine.cuda_graph_impl != "none":
        raise UserError(
            "engine.cuda_graph_impl: a graph of the MLP is for layers where it stands behind attention, and"
            " model.language.use_parallel_residual has it beside; set it to none"
        )
    if not language.fused_rotary or parallel.context_parallel_size > 1:  # whose angles are of this rank's positions
        off["apply_rope_fusion"] = False
    config = context.language_config(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        kv_channels=language.kv_channels,
        normalization=language.normalization,
        layernorm_zero_centered_gamma=language.layernorm_zero_centered_gamma,
        layernorm_epsilon=language.norm_epsilon,
        gated_linear_unit=language.gated_linear_unit,
        activation_func=_ACTIVATIONS[language.activation],
        add_bias_linear=language.add_bias_linear,
        add_qkv_bias=language.add_qkv_bias,
        # With cross-attention of their layers' norms alone: Megatron-Core sums the gradients of all by their names.
        qk_layernorm=language.qk_layernorm or bool(language.cross_attention_layers),
        # Layers of two kinds are not stacked in checkpoints. (The name is Megatron-Core's.)
        hetereogenous_dist_checkpoint=bool(language.cross_attention_layers),
        softmax_scale=None if language.query_pre_attn_scalar is None else language.query_pre_attn_scalar**-0.5,
        rotary_interleaved=language.rotary_interleaved,
        init_method_std=language.init_method_std,
        **_expert_settings(language, parallel),
        **off,
    )
    # Megatron's name for "the activation that the layer spec brings", which is ours: layers/activation.py.
    config.use_te_activation_func = swiglu and not has_kernels() and not config.bias_activation_fusion
    return config


def _expert_settings(language: DecoderConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Return the settings of layers with experts; none where there are none."""
    layers = language.expert_layers
    if not any(layers):
        return {}
    named = (
        "num_moe_experts", "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax",
        "moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor",
        "moe_router_enable_expert_bias", "moe_router_bias_update_rate", "moe_router_load_balancing_type",
        "moe_z_loss_coeff", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
        "moe_expert_capacity_factor",
    )  # fmt: skip
    return {name: getattr(language, name) for name in named} | {
        "moe_ffn_hidden_size": language.expert_width,
        # As one number where all are alike: Megatron-Core's checkpoints have a layers' axis then.
        "moe_layer_freq": 1 if all(layers) else [int(here) for here in layers],
        "moe_aux_loss_coeff": language.moe_aux_loss_coeff,
        "moe_router_dtype": "fp32",
        # Ranks that share experts gather each other's tokens, which are not equally many: gloo cannot do that.
        "moe_token_dispatcher_type": "alltoall" if has_kernels() or parallel.expert_tensor_ranks == 1 else "allgather",
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_ranks,
    }


def layer_plan(language: DecoderConfig) -> tuple[LayerKind, ...]:
    """Return the kind of each layer of the model, whichever stage has it."""
    kind = LayerKind(
        "causal" if language.attention_mask == "causal" else "two_way",
        head_dim=language.kv_channels,
        qk_layernorm=language.qk_layernorm,
        parallel=language.use_parallel_residual,
        residual_multiplier=language.residual_multiplier,
        sliding_window=language.sliding_window,
        rotary_part=None if language.rope_local_base_freq is None else 1,
        visual_expert=language.visual_expert,
        head_layernorm=language.head_layernorm,
        behind=not language.pre_layernorms,
        features=_features(language),
        latent=_latent(language),
    )
    whole = replace(kind, sliding_window=None, rotary_part=None if kind.rotary_part is None else 0)
    every = language.sliding_window_pattern
    plan = [kind if every is None or number % every else whole for number in range(1, language.num_layers + 1)]
    plan = [replace(kind, experts=experts) for kind, experts in zip(plan, language.expert_layers, strict=True)]
    for number in language.cross_attention_layers:
        plan[number] = LayerKind("cross")
    return tuple(plan)


def _branch_norm(config: TransformerConfig) -> TransformerConfig:
    """Return the configuration of the norm behind attention alone: its kind and epsilon are not those of the others."""
    own = copy.copy(config)
    own.normalization, own.layernorm_epsilon, own.layernorm_zero_centered_gamma = "RMSNorm", BRANCH_EPSILON, False
    return own


def _features(language: DecoderConfig) -> tuple[int, int, int] | None:
    """Return heads, their width and that of features, of attention beside text."""
    features, width, heads = (
        language.cross_hidden_size,
        language.cross_compute_hidden_size,
        language.num_attention_heads,
    )
    return None if features is None or width is None else (heads, width // heads, features)


def _latent(language: DecoderConfig) -> LatentHeads | None:
    """Return the sizes of latent attention; None where keys and values are made of the stream."""
    if language.kv_lora_rank is None:
        return None
    assert language.v_head_dim is not None
    return LatentHeads(language.rotary_channels, language.v_head_dim, language.kv_lora_rank, language.q_lora_rank)


def padded_vocab_size(language: LanguageConfig, context: BuildContext) -> int:
    """Return the vocabulary rounded up to a multiple of ``vocab_divisor`` x TP, as Megatron pads it."""
    multiple = language.vocab_divisor * context.parallel.tensor_model_parallel_size
    return -(-language.vocab_size // multiple) * multiple


def mask_padding(model: GPTModel, vocab_size: int) -> None:
    """Take the rows that pad the vocabulary out of the softmax.

    How many there are follows from TP; without this, the loss would too, and differ from the checkpoint's own.
    """
    layer = model.output_layer
    rows = layer.output_size_per_partition
    real = min(max(vocab_size - mpu.get_tensor_model_parallel_rank() * rows, 0), rows)

    def mask(_layer: Any, _inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
        output[0][..., real:].fill_(float("-inf"))

    if real < rows:
        layer.register_forward_hook(mask)


def _mask_pictures(model: GPTModel, first: int, stop: int) -> None:
    """Take the tokens that pictures are written in out of the softmax (Chameleon in Transformers).

    Not while the model says pictures itself (``models/codes.py``): it is trained to, or is asked for one.
    """
    model.says_pictures = False
    layer = model.output_layer
    rows = layer.output_size_per_partition
    own, end = (min(max(number - mpu.get_tensor_model_parallel_rank() * rows, 0), rows) for number in (first, stop))

    def mask(_layer: Any, _inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
        if not model.says_pictures:
            output[0][..., own:end].fill_(torch.finfo(output[0].dtype).min)  # as there, where it is no infinity

    if own < end:
        layer.register_forward_hook(mask)


def _multiply_embeddings(model: GPTModel, multiplier: float, dtype: torch.dtype) -> None:
    """Multiply what the embedding gives of tokens; what is put in its place afterwards (image features) is not.

    The number is rounded to the weights' type first, as Gemma's is.
    """
    rounded = torch.tensor(multiplier, dtype=dtype, device="cpu").item()

    def multiply(_embedding: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        return embedded * rounded

    model.embedding.register_forward_hook(multiply)


def _finish_head(model: GPTModel, language: DecoderConfig, context: BuildContext) -> None:
    """Give the output layer its bias, and divide what it reads: logits would be larger."""
    layer = model.output_layer
    if language.lm_head_bias:
        bias = torch.nn.Parameter(
            torch.zeros(layer.output_size_per_partition, dtype=context.dtype, device=layer.weight.device)
        )
        set_tensor_model_parallel_attributes(bias, is_parallel=True, dim=0, stride=1)
        layer.bias = bias
    if language.logits_scaling != 1:
        layer.register_forward_pre_hook(lambda _layer, inputs: (inputs[0] / language.logits_scaling, *inputs[1:]))


@with_all_keys
def build(
    language: DecoderConfig,
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
    linears, levels = adapted_linears(language, context.lora), context.deepstack
    plan = tuple(replace(kind, deepstack=number < levels) for number, kind in enumerate(layer_plan(language)))
    engine = context.transformer_engine
    modules = {
        kind: cross_modules(transformer_engine=engine, linears=linears)
        if kind.mixer == "cross"
        else layer_modules(kind, transformer_engine=engine, linears=linears)
        for kind in set(plan)
    }
    if language.post_layernorms:
        for one in modules.values():
            params = {"norm": one.norm, "config": config, "multiplier": language.residual_multiplier}
            one.layer.submodules.self_attn_bda = ModuleSpec(module=NormedSum, params=params)
            one.layer.submodules.mlp_bda = ModuleSpec(module=NormedSum, params=params)
    if language.attention_branch_norm:
        for one in modules.values():
            params = {"norm": one.norm, "config": _branch_norm(config), "multiplier": language.residual_multiplier}
            one.layer.submodules.self_attn_bda = ModuleSpec(module=NormedSum, params=params)
    first = get_transformer_layer_offset(config, vp_stage)
    here = plan[first : first + get_num_layers_to_build(config, vp_stage)]
    model = GPTModel(
        config=config,
        transformer_layer_spec=block_submodules([modules[kind] for kind in here]),
        vocab_size=padded_vocab_size(language, context),
        max_sequence_length=language.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=language.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_percent=language.rotary_percent,
        rotary_base=language.rotary_base,
        seq_len_interpolation_factor=language.rope_scaling_factor if language.rope_scaling == "linear" else None,
        rope_scaling=language.rope_scaling == "llama3",
        rope_scaling_factor=language.rope_scaling_factor,
        # Image features are spliced in first; then the model scatters the sequence itself.
        scatter_embedding_sequence_parallel=False,
        vp_stage=vp_stage,
    )
    if not config.apply_rope_fusion:  # Transformer Engine's kernel takes Megatron-Core's table of one segment
        axes = pair_axes(language.rotary_sections, interleaved=language.rotary_sections_interleaved)
        if language.rope_local_base_freq is None:
            PackRotary.take_over(model.rotary_pos_emb, axes)
        else:
            TwoRotaries.begin(model.rotary_pos_emb, language.rope_local_base_freq)
    if language.activation != "silu" or not language.gated_linear_unit:
        kind = GeGLUMLP if language.gated_linear_unit else BiasActivationMLP
        for layer in model.decoder.layers:
            if isinstance(layer.mlp, MLP):  # an expert's own is given a weight for each token, and stays as it is
                kind.take_over(layer.mlp)
    if pre_process and language.embedding_multiplier != 1:
        _multiply_embeddings(model, language.embedding_multiplier, context.dtype)
    if post_process:
        _finish_head(model, language, context)
        mask_padding(model, language.output_rows)
        if language.picture_tokens is not None:
            _mask_pictures(model, *language.picture_tokens)
    # The routers keep their biases; they are moved behind a step that was made (training/experts.py), and not by
    # Megatron-Core before anybody knows whether it is.
    config.moe_router_enable_expert_bias = False
    return model
