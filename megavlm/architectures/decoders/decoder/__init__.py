"""Decoder-only language models: Qwen v1, 2 and 3, and Llama."""
