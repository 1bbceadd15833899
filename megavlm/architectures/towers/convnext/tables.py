"""Names of ConvNeXt's weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import Row, Table, both, row

_TIMM_BLOCK = {
    "depthwise": "conv_dw", "norm": "norm", "linear_fc1": "mlp.fc1", "linear_fc2": "mlp.fc2",
}  # fmt: skip


def timm_convnext(depths: tuple[int, ...], *, ours: str = "", stem: str, stages: str) -> Table:
    """Return the names that timm's module has, whose blocks are counted anew in each stage.

    Args:
        depths: blocks of each stage.
        ours: in front of our names.
        stem: in front of the first convolution and its norm.
        stages: in front of the number of a stage.
    """
    rows: list[Row] = [*both(f"{ours}conv1", f"{stem}.0"), *both(f"{ours}ln_pre", f"{stem}.1")]
    number = 0
    for stage, depth in enumerate(depths):
        if stage:
            rows += both(f"{ours}layers.{number}.downsample.norm", f"{stages}.{stage}.downsample.0")
            rows += both(f"{ours}layers.{number}.downsample.conv", f"{stages}.{stage}.downsample.1")
        for block in range(depth):
            mine, theirs = f"{ours}layers.{number}.", f"{stages}.{stage}.blocks.{block}."
            rows.append(row(mine + "scale", theirs + "gamma"))
            rows += [one for a, b in _TIMM_BLOCK.items() for one in both(mine + a, theirs + b)]
            number += 1
    return Table(part="vision", rest=tuple(rows))
