"""Language models: one folder each, named here."""

FOLDERS = ("decoder", "mamba", "encoder_decoder")
