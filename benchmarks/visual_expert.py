"""Time of a language layer with weights for image tokens against a plain one, forward and backward, in turns.

python benchmarks/visual_expert.py [ROUNDS]: the median of ratios of neighbouring runs, at 0, 50 and 100 % image tokens.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402

from megavlm.architectures.context import BuildContext  # noqa: E402
from megavlm.architectures.decoders.decoder.config import DecoderConfig  # noqa: E402
from megavlm.config.architecture import LANGUAGE  # noqa: E402
from megavlm.config.schema import ParallelConfig  # noqa: E402
from megavlm.families.presets import load_presets  # noqa: E402
from megavlm.layers.segments import packed_segments  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402

LENGTH, WIDTH = 1024, 512
CPU = torch.device("cpu")


def layer(*, expert: bool) -> Any:
    """Return one layer."""
    found = LANGUAGE.find("llama")
    keys: dict[str, Any] = {
        **found.values, "preset": "llama", "num_layers": 1, "hidden_size": WIDTH, "ffn_hidden_size": 1376,
        "num_attention_heads": 8, "num_query_groups": 8, "kv_channels": 64, "vocab_size": 128,
        "max_position_embeddings": LENGTH, "visual_expert": expert,
    }  # fmt: skip
    model = found.build(TypeAdapter(DecoderConfig).validate_python(keys), BuildContext(ParallelConfig()))
    return model.decoder.layers[0]


def run(one: Any, share: float) -> float:
    """Return the seconds of a forward and a backward pass."""
    stop = int(LENGTH * share) + 1
    spans = [(0, min(stop, LENGTH))] if share else []
    packed = packed_segments(np.array([0, LENGTH], np.int32), CPU, spans=spans)
    x = torch.randn(LENGTH, 1, WIDTH, requires_grad=True)
    start = time.perf_counter()
    one(hidden_states=x, attention_mask=None, packed_seq_params=packed)[0].sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Print the ratios."""
    load_presets()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with process_groups(ParallelConfig(), seed=1):
        plain, expert = layer(expert=False), layer(expert=True)
        for share in (0.0, 0.5, 1.0):
            run(plain, share), run(expert, share)
            found = [(run(plain, share), run(expert, share)) for _ in range(rounds)]
            ratio = statistics.median(own / other for other, own in found)
            ms = statistics.median(other for other, _ in found) * 1000
            print(f"{share:4.0%} image tokens: {ratio:.3f} of a plain layer ({ms:.0f} ms)")


if __name__ == "__main__":
    main()
