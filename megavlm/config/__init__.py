"""Recipes: the typed tree, YAML loading with overrides, and the checks made before a process group starts."""
