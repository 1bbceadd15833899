"""Vision towers: one folder each, named here."""

FOLDERS = ("vit", "packed_vit", "tiled_vit", "convnext", "sam", "vit_sam", "vit_convnext", "vit_vit")
