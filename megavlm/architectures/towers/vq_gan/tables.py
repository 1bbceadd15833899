"""Names of VQ-GAN's weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import Aside, Row, Table, both, row

POST = "post_quant_conv"
"""What a decoder would begin with."""
_BLOCK = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")


def chameleon_vq_gan(levels: int, blocks: int) -> Table:
    """Return Transformers' names: those of the modules here, but the codebook's.

    Args:
        levels: whose maps have different sizes.
        blocks: residual blocks of a level.
    """
    names = ["encoder.conv_in", "encoder.norm_out", "encoder.conv_out", "quant_conv"]
    names += [f"encoder.mid.attn_1.{one}" for one in ("norm", "q", "k", "v", "proj_out")]
    residual = ["encoder.mid.block_1", "encoder.mid.block_2"]
    for level in range(levels):
        names.append(f"encoder.down.{level}.downsample.conv")
        residual += [f"encoder.down.{level}.block.{block}" for block in range(blocks)]
    names += [f"{block}.{one}" for block in residual for one in _BLOCK]
    rows: list[Row] = [one for name in names for one in both(name, name)]
    rows.append(row("codebook.weight", "quantize.embedding.weight"))
    aside = (Aside(rf"{POST}\.(weight|bias)", "first layer of a decoder of pictures", carried=True),)
    return Table(part="vision", rest=tuple(rows), aside=aside, prefix="model.vqmodel.")
