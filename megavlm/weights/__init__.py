"""Files of weights and rules between names: what architectures and families need of them, and no more."""
