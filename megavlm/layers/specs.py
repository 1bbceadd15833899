"""Layer specs: which classes Megatron-Core builds a transformer layer from, Transformer Engine or plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megavlm.config.errors import UserError
from megavlm.layers.activation import swiglu
from megavlm.layers.attention import CompactSelfAttention, TorchAttention
from megavlm.layers.cross import CrossHeads, CrossSubmodules, PictureAttention, PictureLayer
from megavlm.layers.cross_beside import FeatureAttention, FeatureLayer
from megavlm.layers.deepstack import DeepstackLayer
from megavlm.layers.encoder_decoder import AnsweringLayer, DistanceAttention, EncodedAttention
from megavlm.layers.experts import experts_mlp
from megavlm.layers.head_norm import HeadNormSelfAttention
from megavlm.layers.latent import LatentAttention, LatentHeads, LatentSubmodules
from megavlm.layers.mamba import MambaMixer, MambaSubmodules
from megavlm.layers.norm import TorchNorm
from megavlm.layers.parallel_layer import ParallelTransformerLayer
from megavlm.layers.scale import GatedSum, ResidualMultiplier
from megavlm.layers.two_way import TwoWayAttention
from megavlm.layers.visual_expert import VISION, TwoKindsColumnLinear, TwoKindsRowLinear, VisualExpertLayer
from megavlm.layers.visual_expert_lora import AdaptedTwoKindsColumnLinear, AdaptedTwoKindsRowLinear
from megavlm.parallel.device import has_kernels, transformer_engine_installed
from megavlm.parallel.megatron_versions import activation_of


def use_transformer_engine(choice: str, precision: str = "bf16") -> bool:
    """Resolve the recipe's ``parallel.transformer_impl``: auto, transformer_engine or torch.

    In fp32 auto means torch: Transformer Engine's attention on packed samples knows 16-bit types only.

    Raises:
        UserError: Transformer Engine is asked for, and there is no CUDA device or it is not installed.
    """
    installed = transformer_engine_installed()
    if choice == "transformer_engine" and not (installed and has_kernels()):
        missing = "transformer-engine is not installed" if not installed else "there is no CUDA device"
        raise UserError(
            f"parallel.transformer_impl: transformer_engine is asked for, but {missing}; "
            "install transformer-engine[pytorch] on a CUDA machine, or set it to torch or auto"
        )
    if choice == "auto" and precision == "fp32":
        return False
    return choice != "torch" and installed and has_kernels()


WIDEST_ENGINE_HEAD = 128
"""Transformer Engine 2.11's attention on packs is wrong for heads of 192, whose outputs differed by as much as they are
large on an H200 (benchmarks/gpu.md), and right for 64 to 128; wider heads get torch's flash attention."""


@dataclass(frozen=True)
class LayerKind:
    """What a layer does. A model's plan has one for each of its layers; equal kinds are built alike."""

    mixer: Literal["causal", "full", "two_way", "cross", "mamba"]
    """Attention in a segment: of each position to those before it and itself, to all, or to those before it and to all
    of the span that it lies in (``layers/two_way.py``). Or to features of pictures (:func:`cross_modules`). Or none: a
    state that goes from position to position (:func:`mamba_modules`)."""
    head_dim: int = 0
    """Width of a head, which decides who attends; 0 where it is at most ``WIDEST_ENGINE_HEAD``."""
    qk_layernorm: bool = False
    """Each head's queries and keys are normalised."""
    parallel: bool = False
    """Attention and MLP stand side by side behind one norm."""
    residual_multiplier: float = 1.0
    """Of what attention and MLP give, before it is added."""
    sliding_window: int | None = None
    """Positions that each attends to, its own among them; None for all."""
    rotary_part: int | None = None
    """Which of two rotary tables turns its heads; None where there is one."""
    deepstack: bool = False
    """What the context holds is added behind it (``layers/deepstack.py``)."""
    visual_expert: bool = False
    """Its linear layers have weights of their own for image tokens (``layers/visual_expert.py``)."""
    features: tuple[int, int, int] | None = None
    """Behind self-attention it attends to features: heads, width of one, width of a feature
    (``layers/cross_beside.py``)."""
    experts: bool = False
    """Its MLP is a mixture of experts."""
    head_layernorm: bool = False
    """Each head's queries and keys have a LayerNorm of their own (``layers/head_norm.py``)."""
    behind: bool = False
    """No norm stands in front of attention and MLP."""
    latent: LatentHeads | None = None
    """Keys and values of its attention are made of a latent (``layers/latent.py``)."""


_MASKS = {"causal": AttnMaskType.causal, "full": AttnMaskType.no_mask, "two_way": AttnMaskType.causal}


@dataclass(frozen=True)
class Modules:
    """The parts from which a layer is built."""

    core_attention: Any
    norm: Any
    layer: ModuleSpec
    column_parallel: Any = ColumnParallelLinear
    row_parallel: Any = RowParallelLinear


def layer_modules(kind: LayerKind, *, transformer_engine: bool, linears: Mapping[str, Any] | None = None) -> Modules:
    """Return the parts of a layer.

    ``linears`` replaces linear layers (linear_qkv, linear_proj, linear_fc1, linear_fc2; of experts
    experts.linear_fc1, .., of shared ones shared_experts.linear_fc1, .., if they have others than they would have).
    Transformer Engine's layers have the norm in front of them inside; with others, its norm and its attention stand
    alone (not run on a GPU). With ``kind.qk_layernorm``, every tensor-parallel rank has its own heads but the same
    weights: Megatron-Core sums their gradients, which it knows by the names q_layernorm and k_layernorm.
    """
    linears = _two_kinds_linears(linears) if kind.visual_expert else linears
    core_attention: Any = TorchAttention
    norm: Any = TorchNorm
    attention_params: dict[str, Any] = {"attn_mask_type": _MASKS[kind.mixer]}
    chosen = dict(linears or {})
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm  # noqa: PLC0415

        norm = TENorm
        # Of a window Transformer Engine's attention is told by the configuration, one for all layers.
        if kind.head_dim <= WIDEST_ENGINE_HEAD and kind.sliding_window is None:
            core_attention = TEDotProductAttention
    if kind.mixer == "two_way":
        core_attention = ModuleSpec(module=TwoWayAttention, params={"sliding_window": kind.sliding_window})
    elif kind.sliding_window is not None:
        core_attention = ModuleSpec(module=TorchAttention, params={"sliding_window": kind.sliding_window})
    told = {"sliding_window": kind.sliding_window, "rotary_part": kind.rotary_part}
    attention_params |= {name: value for name, value in told.items() if value is not None}
    attention = HeadNormSelfAttention if kind.head_layernorm else CompactSelfAttention
    inside = transformer_engine and linears is None and not (kind.parallel or kind.behind or kind.latent)
    if transformer_engine and linears is None:
        chosen = _engine_linears(norms_inside=inside)
    if transformer_engine and kind.experts and not any("experts." in name for name in chosen):
        chosen |= _engine_experts()
    layer = ModuleSpec(
        module=_layer_class(kind),
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if kind.behind or inside else norm,
            self_attention=ModuleSpec(
                module=attention,
                params=attention_params,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=chosen.get("linear_qkv", ColumnParallelLinear),
                    core_attention=core_attention,
                    linear_proj=chosen.get("linear_proj", RowParallelLinear),
                    q_layernorm=norm if kind.qk_layernorm else IdentityOp,
                    k_layernorm=norm if kind.qk_layernorm else IdentityOp,
                ),
            ),
            self_attn_bda=_branch_sum(kind),
            pre_mlp_layernorm=IdentityOp if kind.parallel or kind.behind or inside else norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=chosen.get("linear_fc1", ColumnParallelLinear),
                    linear_fc2=chosen.get("linear_fc2", RowParallelLinear),
                    activation_func=activation_of(swiglu),  # only where the configuration says use_te_activation_func
                ),
            ),
            mlp_bda=_branch_sum(kind),
            # The names that Transformer Engine's fused norm-and-linear has: one checkpoint serves both.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
    _with_features(layer, norm, kind)
    _with_latent(layer, norm, kind, chosen)
    if kind.experts:
        _with_experts(layer, IdentityOp if kind.parallel or kind.behind else norm, chosen)
    return Modules(core_attention, norm, layer)


def cross_modules(*, transformer_engine: bool, linears: Mapping[str, Any] | None = None) -> Modules:
    """Return the parts of a layer that attends to pictures; with Transformer Engine's norms its linears are plain.

    ``linears`` replaces linear layers: linear_fc1, linear_fc2, and cross_attention.linear_q, _kv, _proj.
    """
    chosen = linears or {}
    own = {name: chosen.get(f"cross_attention.{name}") for name in ("linear_q", "linear_kv", "linear_proj")}
    norm: Any = TorchNorm
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm  # noqa: PLC0415

        norm = TENorm
    column, row = ColumnParallelLinear, RowParallelLinear
    attention = CrossSubmodules(
        own["linear_q"] or column, own["linear_kv"] or column, own["linear_proj"] or row, norm, norm
    )
    layer = ModuleSpec(
        module=PictureLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            cross_attention=ModuleSpec(module=PictureAttention, submodules=attention),
            cross_attn_bda=GatedSum,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=chosen.get("linear_fc1", column),
                    linear_fc2=chosen.get("linear_fc2", row),
                    activation_func=activation_of(swiglu),  # only where the configuration says use_te_activation_func
                ),
            ),
            sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
        ),
    )
    return Modules(TorchAttention, norm, layer)


def _with_features(layer: ModuleSpec, norm: Any, kind: LayerKind) -> None:
    """Put attention to features behind a layer's self-attention, with a norm in front, if it is of that kind."""
    if kind.features is None:
        return
    shape = CrossHeads(*kind.features)
    parts = CrossSubmodules(ColumnParallelLinear, ColumnParallelLinear, RowParallelLinear, IdentityOp, IdentityOp)
    layer.submodules.pre_cross_attn_layernorm, layer.submodules.cross_attn_bda = norm, get_bias_dropout_add
    layer.submodules.cross_attention = ModuleSpec(module=FeatureAttention, params={"shape": shape}, submodules=parts)


def _with_latent(layer: ModuleSpec, norm: Any, kind: LayerKind, chosen: Mapping[str, Any]) -> None:
    """Put latent attention in the place of a layer's self-attention, if it is of that kind."""
    if kind.latent is None:
        return
    attention, column = layer.submodules.self_attention, chosen.get("linear_qkv", ColumnParallelLinear)
    layer.submodules.self_attention = ModuleSpec(
        module=LatentAttention,
        params={**attention.params, "heads": kind.latent},
        submodules=LatentSubmodules(
            linear_q=chosen.get("linear_q_proj" if kind.latent.query_latent is None else "linear_q_up_proj", column),
            linear_kv_up=chosen.get("linear_kv_up_proj", column),
            linear_proj=attention.submodules.linear_proj,
            core_attention=attention.submodules.core_attention,
            norm=norm,
        ),
    )


def mamba_modules(
    *, transformer_engine: bool, linears: Mapping[str, Any] | None = None, sizes: Mapping[str, int]
) -> Modules:
    """Return the parts of a layer whose mixer is Mamba's: a norm in front of it, and no MLP.

    ``linears`` replaces ``in_proj`` and ``x_proj``; ``sizes`` are those that :class:`MambaMixer` asks for. With
    Transformer Engine the norms are its (not run on a GPU), and the linear layers plain.
    """
    norm: Any = TorchNorm
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm  # noqa: PLC0415

        norm = TENorm
    chosen = linears or {}
    parts = MambaSubmodules(
        chosen.get("in_proj", ColumnParallelLinear), chosen.get("x_proj", RowParallelLinear), RowParallelLinear
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(module=MambaMixer, params=dict(sizes), submodules=parts),
            self_attn_bda=get_bias_dropout_add,
        ),
    )
    return Modules(MambaMixer, norm, layer)


def stack_modules(*, decodes: bool, transformer_engine: bool) -> Modules:
    """Return the parts of a layer of an encoder, or of the decoder that attends to it.

    With Transformer Engine the norms are its (not run on a GPU), and the linear layers plain.
    """
    norm: Any = TorchNorm
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm  # noqa: PLC0415

        norm = TENorm
    column, row = ColumnParallelLinear, RowParallelLinear
    parts = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=CompactSelfAttention,
            params={"attn_mask_type": AttnMaskType.causal if decodes else AttnMaskType.no_mask},
            submodules=SelfAttentionSubmodules(
                linear_qkv=column, core_attention=DistanceAttention, linear_proj=row,
                q_layernorm=IdentityOp, k_layernorm=IdentityOp,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=activation_of(swiglu)),
        ),
        mlp_bda=get_bias_dropout_add,
    )  # fmt: skip
    if decodes:
        parts.pre_cross_attn_layernorm, parts.cross_attn_bda = norm, get_bias_dropout_add
        own = CrossAttentionSubmodules(linear_q=column, linear_kv=column, core_attention=DistanceAttention,
                                       linear_proj=row)  # fmt: skip
        parts.cross_attention = ModuleSpec(module=EncodedAttention, submodules=own)
    return Modules(
        DistanceAttention, norm, ModuleSpec(AnsweringLayer if decodes else TransformerLayer, submodules=parts)
    )


def _with_experts(layer: ModuleSpec, norm: Any, linears: Mapping[str, Any]) -> None:
    """Put experts in the place of a layer's MLP; its norm stands alone then, also with Transformer Engine."""
    parts, kinds = layer.submodules, ("experts.", "shared_experts.")
    own = {name: one for name, one in linears.items() if name.startswith(kinds)}
    parts.pre_mlp_layernorm, parts.mlp = norm, experts_mlp(own)
    names = parts.sharded_state_dict_keys_map
    parts.sharded_state_dict_keys_map = {old: new for old, new in names.items() if old != "pre_mlp_layernorm."}


def _layer_class(kind: LayerKind) -> type[TransformerLayer]:
    assert sum((kind.parallel, kind.deepstack, kind.visual_expert)) < 2, "each of these is a layer of its own"
    assert not (kind.experts and kind.visual_expert), "tokens are told apart by their kind or by a router"
    if kind.parallel:
        return ParallelTransformerLayer
    if kind.visual_expert:
        return VisualExpertLayer if kind.features is None else FeatureLayer
    assert kind.features is None, "attention to features is built into a visual expert's layer"
    return DeepstackLayer if kind.deepstack else TransformerLayer


def _branch_sum(kind: LayerKind) -> Any:
    """Return what adds a branch to the stream."""
    if kind.residual_multiplier == 1:
        return get_bias_dropout_add
    return ModuleSpec(module=ResidualMultiplier, params={"multiplier": kind.residual_multiplier})


def _two_kinds_linears(others: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return linear layers with weights for text and for image tokens, of a gated MLP."""
    column: Any = TwoKindsColumnLinear if others is None else AdaptedTwoKindsColumnLinear
    row: Any = TwoKindsRowLinear if others is None else AdaptedTwoKindsRowLinear
    kinds = {"linear_qkv": column, "linear_proj": row, "linear_fc1": column, "linear_fc2": row}
    found = {}
    for name, kind in kinds.items():
        params: dict[str, Any] = {"halves": True} if name == "linear_fc1" else {}
        if others is not None:
            own, image = others[name].params, others[f"{name}.{VISION}"].params
            params |= {**own, "image_adapter": image["adapter"]}
        found[name] = ModuleSpec(module=kind, params=params)
    return found


def _engine_linears(*, norms_inside: bool) -> dict[str, Any]:
    """Return Transformer Engine's linear layers, with the norm in front inside, or without (these not run on a GPU).

    Not by Megatron-Core's own specs: nothing can be put into those of 0.19, which are functions.
    """
    from megatron.core.extensions.transformer_engine import (  # noqa: PLC0415
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    column = TELayerNormColumnParallelLinear if norms_inside else TEColumnParallelLinear
    kinds = {"linear_qkv": column, "linear_fc1": column}
    return kinds | {"linear_proj": TERowParallelLinear, "linear_fc2": TERowParallelLinear}


def _engine_experts() -> dict[str, Any]:
    """Return Transformer Engine's linear layers of experts, one after the other (not run on a GPU)."""
    plain = _engine_linears(norms_inside=False)
    return {
        f"{kind}.{name}": plain[name] for kind in ("experts", "shared_experts") for name in ("linear_fc1", "linear_fc2")
    }


def block_submodules(layers: Sequence[Modules]) -> TransformerBlockSubmodules:
    """Return the submodules of a block of ``layers`` (those of this pipeline stage) with a final norm."""
    return TransformerBlockSubmodules(layer_specs=[one.layer for one in layers], layer_norm=layers[0].norm)
