"""Names of SAM's weights in published checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.architectures.towers.sam.config import SamConfig
from megavlm.weights.rules import QKV_BLOCKS, Heads, Reshape, Row, Table, both, row

_TABLE = Reshape(
    "[1, side, side, width] to [side * side, width]",
    lambda x, _: [x[0].flatten(0, 2)],
    lambda x, _: [x[0].unflatten(0, (round(x[0].size(0) ** 0.5), -1)).unsqueeze(0)],
)
_NECK = ("conv1", "norm1", "conv2", "norm2")


@dataclass(frozen=True)
class _Names:
    """What a layout calls the encoder's tensors."""

    patches: str
    layers: str
    norms: tuple[str, str]
    neck: tuple[str, ...]


_TRANSFORMERS = _Names(
    "patch_embed.projection", "layers", ("layer_norm1", "layer_norm2"), ("conv1", "layer_norm1", "conv2", "layer_norm2")
)
_ORIGINAL = _Names("patch_embed.proj", "blocks", ("norm1", "norm2"), ("0", "1", "2", "3"))


def _neck(ours: str, theirs: str, names: _Names) -> list[Row]:
    return [one for a, b in zip(_NECK, names.neck, strict=True) for one in both(f"{ours}.{a}", f"{theirs}.{b}")]


def sam_table(vision: SamConfig, *, ours: str = "", tower: str, top: str) -> Table:
    """Return the names of SAM's encoder as Transformers writes it, and of DeepSeek-VL's parts behind it.

    The layers are among the table's other rows: of two towers, the table counts the layers and heads of the first.

    Args:
        vision: the tower's keys.
        ours: in front of our names of the tower.
        tower: in front of the encoder's names.
        top: in front of the others'.
    """
    rows = [
        *_encoder(vision, ours, tower, _TRANSFORMERS),
        *_neck(f"{ours}second_neck", f"{top}high_res_vision_neck", _TRANSFORMERS),
        row(f"{ours}second_scale", f"{top}high_res_vision_alpha"),
        row(f"{ours}halve1.weight", f"{top}high_res_vision_proj.conv1.weight"),
        row(f"{ours}halve2.weight", f"{top}high_res_vision_proj.conv2.weight"),
    ]
    return Table(part="vision", rest=tuple(rows))


def original_sam_table(vision: SamConfig, *, ours: str = "", tower: str) -> Table:
    """Return the names of SAM's encoder as its authors write it, and of Vary's convolutions behind it.

    Args:
        vision: the tower's keys.
        ours: in front of our names of the tower.
        tower: in front of theirs.
    """
    rows = [
        *_encoder(vision, ours, tower, _ORIGINAL),
        row(f"{ours}halve1.weight", f"{tower}net_2.weight"),
        row(f"{ours}halve2.weight", f"{tower}net_3.weight"),
    ]
    return Table(part="vision", rest=tuple(rows))


def _encoder(vision: SamConfig, ours: str, tower: str, names: _Names) -> list[Row]:
    count = vision.num_attention_heads
    heads = Heads(count, count, vision.hidden_size // count)
    blocks = Reshape(
        QKV_BLOCKS.name, lambda x, _: QKV_BLOCKS.to_ours(x, heads), lambda x, _: QKV_BLOCKS.to_theirs(x, heads)
    )
    rows: list[Row] = [
        *both(f"{ours}conv1", f"{tower}{names.patches}"),
        row(f"{ours}positional_embedding", f"{tower}pos_embed", _TABLE),
        *_neck(f"{ours}neck", f"{tower}neck", names),
    ]
    for number in range(vision.num_layers):
        a, b = f"{ours}layers.{number}.", f"{tower}{names.layers}.{number}."
        rows += [
            *both(a + "input_layernorm", b + names.norms[0]),
            *both(a + "self_attention.linear_qkv", b + "attn.qkv", blocks),
            row(a + "self_attention.core_attention.rows", b + "attn.rel_pos_h"),
            row(a + "self_attention.core_attention.columns", b + "attn.rel_pos_w"),
            *both(a + "self_attention.linear_proj", b + "attn.proj"),
            *both(a + "pre_mlp_layernorm", b + names.norms[1]),
            *both(a + "mlp.linear_fc1", b + "mlp.lin1"),
            *both(a + "mlp.linear_fc2", b + "mlp.lin2"),
        ]
    return rows
