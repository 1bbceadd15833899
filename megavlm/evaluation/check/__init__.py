"""``megavlm convert check``: a published checkpoint through Transformers and through the model here, side by side."""
