"""A language layer of megavlm by itself, and what its benchmarks say of the run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vs_transformers import machine

CPU = torch.device("cpu")


def llama_layer(keys: Mapping[str, Any]) -> Any:
    """Return the first layer of a Llama of such ``model.language`` keys; process groups of one process must be up."""
    from pydantic import TypeAdapter

    from megavlm.architectures.context import BuildContext
    from megavlm.architectures.decoders.decoder.config import DecoderConfig
    from megavlm.config.architecture import LANGUAGE
    from megavlm.config.schema import ParallelConfig
    from megavlm.families.presets import load_presets

    load_presets()
    found = LANGUAGE.find("llama")
    whole = {**found.values, "preset": "llama", "num_layers": 1, "vocab_size": 128, **keys}
    model = found.build(TypeAdapter(DecoderConfig).validate_python(whole), BuildContext(ParallelConfig()))
    return model.decoder.layers[0]


def arguments_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return what was asked for, with ``--rounds``, ``--threads`` and ``--out``, and take so many threads."""
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each case")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, help="write the numbers of every round as JSON")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    return asked


def told(asked: argparse.Namespace, where: Mapping[str, Any], command: str) -> list[str]:
    """Return the lines above a table."""
    packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items())
    return [
        f"Machine: {where['cpu']}, {where['cores']} cores, {asked.threads} thread(s) used, load "
        f"{where['load_average_before']:.1f} before the start. Python {where['python']}, {packages}. fp32.",
        f"Command: `{command}`. {asked.rounds} rounds, in turns; medians. Forward and backward.",
    ]


def write(asked: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Write a result where that was asked for."""
    if asked.out is not None:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


__all__ = ["CPU", "arguments_of", "llama_layer", "machine", "told", "write"]
