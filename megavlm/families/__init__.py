"""Families of published models: one file each. This file imports nothing, so that presets are found in an instant."""
