"""Names of a vision transformer's weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import CONCAT, ONE_AXIS, QKV, QKV_BLOCKS, TWO_AXES, Aside, Table, both, row

_VIT_LAYER = "transformer.layers.{}."

QWEN_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="transformer.resblocks.{}.",
    layer=(
        *both("input_layernorm", "ln_1"),
        *both("self_attention.linear_qkv", "attn.in_proj"),  # already [q, k, v] per head
        *both("self_attention.linear_proj", "attn.out_proj"),
        *both("pre_mlp_layernorm", "ln_2"),
        *both("mlp.linear_fc1", "mlp.c_fc"),
        *both("mlp.linear_fc2", "mlp.c_proj"),
    ),
    rest=(
        row("conv1.weight", "conv1.weight"),
        row("positional_embedding", "positional_embedding"),
        *both("ln_pre", "ln_pre"),
    ),
    prefix="transformer.visual.",
)
"""The tower of Qwen-VL."""

TRANSFORMERS_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="encoder.layers.{}.",
    layer=(
        *both("input_layernorm", "layer_norm1"),
        *both("self_attention.linear_qkv", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", QKV),
        *both("self_attention.linear_proj", "self_attn.out_proj"),
        *both("pre_mlp_layernorm", "layer_norm2"),
        *both("mlp.linear_fc1", "mlp.fc1"),
        *both("mlp.linear_fc2", "mlp.fc2"),
    ),
    rest=(
        row("class_embedding", "embeddings.class_embedding"),
        *both("conv1", "embeddings.patch_embedding"),
        row("positional_embedding", "embeddings.position_embedding.weight"),
        *both("ln_pre", "pre_layrnorm"),  # the slip is in the published names
        *both("ln_post", "post_layernorm"),
    ),
    aside=(
        Aside(r"embeddings\.position_ids", "position number buffer"),
        Aside(r"post_layernorm\.(weight|bias)", "norm behind layers that are not used", carried=True),
        Aside(
            r"encoder\.layers\.(\d+)\..*", "layer behind the one whose features are taken", carried=True, behind=True
        ),
        Aside(r"head\..*", "attention pooling head", carried=True),
    ),
    prefix="vision_model.",
)
"""CLIP and SigLIP as Transformers writes them."""

TIMM_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="{tower}blocks.{}.",
    layer=(
        *both("input_layernorm", "norm1"),
        *both("self_attention.linear_qkv", "attn.qkv", QKV_BLOCKS),
        *both("self_attention.linear_proj", "attn.proj"),
        *both("pre_mlp_layernorm", "norm2"),
        *both("mlp.linear_fc1", "mlp.fc1"),
        *both("mlp.linear_fc2", "mlp.fc2"),
    ),
    rest=(
        *both("conv1", "{tower}patch_embed.proj"),
        row("positional_embedding", "{tower}pos_embed", ONE_AXIS),
        *both("ln_post", "{tower}norm"),
    ),
    aside=(
        Aside(r"{tower}blocks\.(\d+)\..*", "layer behind the one whose features are taken", carried=True, behind=True),
        Aside(r"{tower}attn_pool\..*", "attention pooling head", carried=True),
    ),
)
"""SigLIP as timm writes it, and code that is made after it (DeepSeek-VL's own)."""

BLIP2_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="encoder.layers.{}.",
    layer=(
        *both("input_layernorm", "layer_norm1"),
        *both("self_attention.linear_qkv", "self_attn.qkv", QKV_BLOCKS),
        *both("self_attention.linear_proj", "self_attn.projection"),
        *both("pre_mlp_layernorm", "layer_norm2"),
        *both("mlp.linear_fc1", "mlp.fc1"),
        *both("mlp.linear_fc2", "mlp.fc2"),
    ),
    rest=(
        row("class_embedding", "embeddings.class_embedding", TWO_AXES),
        row("positional_embedding", "embeddings.position_embedding", ONE_AXIS),
        *both("conv1", "embeddings.patch_embedding"),
        *both("ln_post", "post_layernorm"),
    ),
    prefix="vision_model.",
)
"""BLIP-2's tower (EVA01-g) as Transformers writes it: keys have a bias there, of zeros in what is published."""

_BEHIND = "layer behind the one whose features are taken"

EVA01_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="blocks.{}.",
    layer=(
        *both("input_layernorm", "norm1"),
        row("self_attention.linear_qkv.weight", "attn.qkv.weight", QKV_BLOCKS),
        row("self_attention.query.bias", "attn.q_bias"),
        row("self_attention.value.bias", "attn.v_bias"),
        *both("self_attention.linear_proj", "attn.proj"),
        *both("pre_mlp_layernorm", "norm2"),
        *both("mlp.linear_fc1", "mlp.fc1"),
        *both("mlp.linear_fc2", "mlp.fc2"),
    ),
    rest=(
        row("class_embedding", "cls_token", TWO_AXES),
        row("positional_embedding", "pos_embed", ONE_AXIS),
        *both("conv1", "patch_embed.proj"),
        *both("ln_post", "{norm}"),
    ),
    aside=(
        Aside(r"(norm|fc_norm|head)\.(weight|bias)", "last norm and head, which BLIP-2 leaves out", carried=True),
        Aside(r"blocks\.(\d+)\..*", _BEHIND, carried=True, behind=True),
    ),
)
"""EVA01-g as BLIP-2's authors (LAVIS, ``eva_vit_g.pth``) write it; the norm behind it lies elsewhere."""

DINOV2_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="encoder.layer.{}.",
    layer=(
        *both("input_layernorm", "norm1"),
        *both(
            "self_attention.linear_qkv",
            "attention.attention.query attention.attention.key attention.attention.value",
            QKV,
        ),
        *both("self_attention.linear_proj", "attention.output.dense"),
        row("self_attn_bda.weight", "layer_scale1.lambda1"),
        *both("pre_mlp_layernorm", "norm2"),
        *both("mlp.linear_fc1", "mlp.{fc1}"),
        *both("mlp.linear_fc2", "mlp.{fc2}"),
        row("mlp_bda.weight", "layer_scale2.lambda1"),
    ),
    rest=(
        row("class_embedding", "embeddings.cls_token", TWO_AXES),
        row("register_embedding", "embeddings.register_tokens", ONE_AXIS),
        row("positional_embedding", "embeddings.position_embeddings", ONE_AXIS),
        *both("conv1", "embeddings.patch_embeddings.projection"),
        *both("ln_post", "layernorm"),
    ),
    aside=(
        Aside(r"embeddings\.mask_token", "mask token of the tower's own training", carried=True),
        Aside(r"layernorm\.(weight|bias)", "norm behind layers that are not used", carried=True),
        Aside(r"encoder\.layer\.(\d+)\..*", _BEHIND, carried=True, behind=True),
    ),
)
"""DINOv2 as Transformers writes it: with a gate, both of the MLP's first layers are one (``weights_in``)."""

TIMM_DINOV2_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="{tower}blocks.{}.",
    layer=(
        *both("input_layernorm", "norm1"),
        *both("self_attention.linear_qkv", "attn.qkv", QKV_BLOCKS),
        *both("self_attention.linear_proj", "attn.proj"),
        row("self_attn_bda.weight", "ls1.gamma"),
        *both("pre_mlp_layernorm", "norm2"),
        *both("mlp.linear_fc1", "mlp.fc1"),
        *both("mlp.linear_fc2", "mlp.fc2"),
        row("mlp_bda.weight", "ls2.gamma"),
    ),
    rest=(
        row("class_embedding", "{tower}cls_token", TWO_AXES),
        row("register_embedding", "{tower}reg_token", ONE_AXIS),
        row("positional_embedding", "{tower}pos_embed", ONE_AXIS),
        *both("conv1", "{tower}patch_embed.proj"),
        *both("ln_post", "{tower}norm"),
    ),
    aside=(
        Aside(r"{tower}norm\.(weight|bias)", "norm behind layers that are not used", carried=True),
        Aside(r"{tower}blocks\.(\d+)\..*", _BEHIND, carried=True, behind=True),
    ),
)
"""DINOv2 with registers as timm writes it, whose class token has no row of the table."""

EVA02_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="{top}blocks.{}.",
    layer=(
        *both("input_layernorm", "norm1"),
        row("self_attention.linear_qkv.weight", "attn.q_proj.weight attn.k_proj.weight attn.v_proj.weight", QKV),
        row("self_attention.query.bias", "attn.{query}"),
        row("self_attention.value.bias", "attn.{value}"),
        *both("self_attention.linear_proj.norm", "attn.{inner}"),
        *both("self_attention.linear_proj", "attn.proj"),
        *both("pre_mlp_layernorm", "norm2"),
        *both("mlp.linear_fc1", "mlp.{gate} mlp.{up}", CONCAT),
        *both("mlp.linear_fc2.norm", "mlp.{inside}"),
        *both("mlp.linear_fc2", "mlp.{down}"),
    ),
    rest=(
        row("class_embedding", "cls_token", TWO_AXES),
        row("positional_embedding", "pos_embed", ONE_AXIS),
        *both("conv1", "patch_embed.proj"),
        *both("ln_post", "norm"),
    ),
    aside=(
        Aside(r"{top}(.*\.)?rope\.freqs_(cos|sin)", "fixed rotary tables", carried=True),
        Aside(r"norm\.(weight|bias)", "norm behind layers that are not used", carried=True),
        Aside(r"{top}blocks\.(\d+)\..*", _BEHIND, carried=True, behind=True),
        Aside(r"(fc_norm|head)\.(weight|bias)", "projection of the class token", carried=True),
        Aside(r"{whole}(text\..*|logit_(scale|bias))",
              "text tower", carried=True),
    ),
)  # fmt: skip
"""EVA02 as timm and as its authors write it: the words in braces."""

COGVLM_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="transformer.layers.{}.",
    layer=(
        *both("self_attention.linear_qkv", "attention.query_key_value", QKV_BLOCKS),
        *both("self_attention.linear_proj", "attention.dense"),
        *both("self_attn_bda.norm", "input_layernorm"),  # behind attention, whatever it is called
        *both("mlp.linear_fc1", "mlp.fc1"),
        *both("mlp.linear_fc2", "mlp.fc2"),
        *both("mlp_bda.norm", "post_attention_layernorm"),
    ),
    rest=(
        row("class_embedding", "patch_embedding.cls_embedding", ONE_AXIS),
        row("positional_embedding", "patch_embedding.position_embedding.weight"),
        *both("conv1", "patch_embedding.proj"),
    ),
    prefix="model.vision.",
)
"""EVA02-CLIP-E as CogVLM has it, without its last layer."""
