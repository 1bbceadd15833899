"""Families of published models. This file imports nothing, so that presets are found in an instant."""
