"""Benchmarks and their metrics. Imports inference, checkpoint, data, models, parallel and config."""
