"""Connectors between tower and language model: one folder each, named here."""

FOLDERS = (
    "resampler", "mlp", "pixel_shuffle", "patch_merger", "downsample_merger", "patch_reducer", "dense_connector", "ldp",
    "c_abstractor", "resampler_2d", "q_former", "hybrid_split", "patch_mining", "glu", "codes",
)  # fmt: skip
