"""A language layer with weights for image tokens (CogVLM) against a plain one, at 0, 50 and 100 % image tokens.

Forward and backward in one process, in turns; the median of ratios of neighbouring runs. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from megavlm.parallel.device import prepare_device  # noqa: E402

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from one_layer import CPU, arguments_of, llama_layer, machine, told, write  # noqa: E402
from turns import Answer, in_turns, median, quotient, timed  # noqa: E402

from megavlm.config.schema import ParallelConfig  # noqa: E402
from megavlm.layers.segments import packed_segments  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402

PLAIN, EXPERT = "plain layer", "visual expert"
SHARES = (0.0, 0.5, 1.0)


def layer(width: int, length: int, *, expert: bool) -> Any:
    """Return a layer of Vicuna's proportions."""
    return llama_layer({
        "hidden_size": width, "ffn_hidden_size": width * 11008 // 4096, "num_attention_heads": width // 64,
        "num_query_groups": width // 64, "kv_channels": 64, "max_position_embeddings": length,
        "visual_expert": expert,
    })  # fmt: skip


def run(one: Any, width: int, length: int, share: float) -> Answer:
    """Return the seconds of a forward and a backward pass."""
    # The last slot of a picture takes text's weights.
    spans = [(0, min(int(length * share) + 1, length))] if share else []
    packed = packed_segments(np.array([0, length], np.int32), CPU, spans=spans)
    x = torch.randn(length, 1, width, requires_grad=True)
    one.zero_grad(set_to_none=True)

    def step() -> None:
        one(hidden_states=x, attention_mask=None, packed_seq_params=packed)[0].sum().backward()

    return timed(step)


def measure(width: int, length: int, rounds: int) -> dict[str, dict[str, list[Answer]]]:
    """Return the answers of every round, by share and layer; process groups must be up."""
    sides = {PLAIN: layer(width, length, expert=False), EXPERT: layer(width, length, expert=True)}
    found = {}
    for share in SHARES:
        calls = {name: partial(run, one, width, length, share) for name, one in sides.items()}
        in_turns("warm-up", calls, 1)
        found[f"{share:.0%}"] = in_turns(f"{share:.0%} image tokens", calls, rounds)
    return found


def table(found: dict[str, dict[str, list[Answer]]]) -> str:
    """Return the Markdown of a result."""
    lines = ["| image tokens | plain layer, ms | visual expert, ms | of the plain one's time | processor time |"]
    lines.append("|---|---|---|---|---|")
    for share, sides in found.items():
        ms = [1000 * median(sides[name]) for name in (PLAIN, EXPERT)]
        ratios = [quotient(sides[EXPERT], sides[PLAIN], key) for key in ("seconds", "cpu_seconds")]
        lines.append(f"| {share} | {ms[0]:.0f} | {ms[1]:.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512, help="of the stream; a multiple of 64")
    parser.add_argument("--length", type=int, default=1024, help="positions of the pack")
    asked, where = arguments_of(parser), machine()
    command = " ".join(["python", "benchmarks/visual_expert.py", *sys.argv[1:]])
    with process_groups(ParallelConfig(), seed=1):
        found = measure(asked.width, asked.length, asked.rounds)
    print("\n".join([*told(asked, where, command), "", table(found)]))
    write(asked, {"command": command, "machine": where, "rounds": found})


if __name__ == "__main__":
    main()
