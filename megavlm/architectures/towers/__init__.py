"""Vision towers: one folder each, named here."""

FOLDERS = ("vit",)
