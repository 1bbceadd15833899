"""Loads of experts while a tiny model learns: without anything that balances them, with the loss, with the biases.

python benchmarks/expert_balance.py [--steps 200] [--out expert_balance.json]: one process, fp32, on the CPU. What is
learned: the next token of a chain in which each token has one usual successor, and otherwise one drawn anew; tokens are
drawn by rank (1 / rank), as words are. The training step is that of ``megavlm train``. A line each: the loss, and the
largest and smallest load of an expert over an equal share, the mean over layers, in the first and the last steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402

from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.batch import make_pack  # noqa: E402
from megavlm.data.device_batch import Batch, make_batch  # noqa: E402
from megavlm.families.presets import expand_presets  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402

VOCABULARY, LENGTH, PACKS, EXPERTS, SPAN = 256, 128, 2, 8, 20
"""``SPAN``: steps that a figure is the mean of."""
USUAL = 0.9
"""Part of the tokens that are the usual successor of the one before."""
WAYS: dict[str, dict[str, Any]] = {
    "softmax, nothing": {},
    "softmax, loss 0.01": {"moe_aux_loss_coeff": 0.01},
    "softmax, loss 0.1": {"moe_aux_loss_coeff": 0.1},
    "sigmoid, nothing": {"moe_router_score_function": "sigmoid"},
    "sigmoid, biases 0.01": {
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.01,
    },
}  # fmt: skip


def recipe_of(way: dict[str, Any]) -> Recipe:
    """Return the recipe of a model of two layers, both with experts; its tower sees nothing here."""
    language = {
        "preset": "qwen3_moe", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4,
        "num_query_groups": 4, "kv_channels": 16, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH,
        "num_moe_experts": EXPERTS, "moe_ffn_hidden_size": 32, "moe_router_topk": 2, "moe_layer_freq": 1, **way,
    }  # fmt: skip
    vision = {"image_size": 32, "hidden_size": 48, "num_layers": 1, "ffn_hidden_size": 96}
    tree: dict[str, Any] = {
        "output_dir": "unused",
        "model": {
            "preset": "tiny", "vision": {**vision, "num_attention_heads": 4, "positional_grid": 2},
            "connector": {"num_queries": 4, "head_dim": 16}, "language": language,
        },
        "data": {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": LENGTH},
        "modules": {"vision": {"freeze": True}, "connector": {"freeze": True}},
        "optimizer": {"lr": 3e-3, "schedule": "constant", "clip_grad": 1.0},
        "training": {"train_steps": 1000, "global_batch_size": PACKS, "precision": "fp32"},
    }  # fmt: skip
    return TypeAdapter(Recipe).validate_python(expand_presets(tree))


class Chain:
    """Tokens to learn."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        words = VOCABULARY - 1  # the last one marks images
        self._next = self._rng.permutation(words)
        self._share = 1 / np.arange(1, words + 1)
        self._share /= self._share.sum()

    def tokens(self) -> NDArray[np.int64]:
        """Return a pack's."""
        drawn = self._rng.choice(len(self._share), LENGTH, p=self._share)
        usual = self._rng.random(LENGTH) < USUAL
        for at in range(1, LENGTH):
            # Chains are short: each of them begins with a word that is common.
            if usual[at] and at % 4:
                drawn[at] = self._next[drawn[at - 1]]
        return drawn.astype(np.int64)

    def batches(self) -> list[Batch]:
        """Return the packs of a step."""
        cpu = torch.device("cpu")
        none = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
        packs = (make_pack([one], LENGTH, labels=[one]) for one in (self.tokens() for _ in range(PACKS)))
        return [make_batch(pack, none, cpu) for pack in packs]


def train(way: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train; return the means over the first and the last steps."""
    recipe, chain = recipe_of(way), Chain(seed=1)
    loads, losses = [], []
    with process_groups(recipe.parallel, seed=1):
        training = build_training(recipe, VOCABULARY - 1)
        for _ in range(steps):
            training.scheduler.step(1)
            result = train_step(training.chunks, training.optimizer, chain.batches(), num_sources=1)
            assert result.experts is not None and result.skipped is None
            losses.append(result.loss)
            loads.append(result.experts.loads.double().numpy())
    found: dict[str, Any] = {}
    for name, part in (("first", slice(0, SPAN)), ("last", slice(-SPAN, None))):
        each = np.sum(loads[part], axis=0)  # [layers, experts]
        each /= each.mean(1, keepdims=True)
        found[name] = {
            "loss": round(float(np.mean(losses[part])), 3),
            "largest": round(float(each.max(1).mean()), 2),
            "smallest": round(float(each.min(1).mean()), 2),
        }
    return found


def main() -> None:
    """Train each way and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.steps < 2 * SPAN:
        parser.error(f"--steps: at least {2 * SPAN}, of which the first and the last {SPAN} are shown")
    load = os.getloadavg()[0]
    results = {name: train(way, args.steps) for name, way in WAYS.items()}
    print(f"| router | loss, first {SPAN} | last | largest load, first | last | smallest load, first | last |")
    print("|---|---|---|---|---|---|---|")
    for name, one in results.items():
        cells = [one[part][key] for key in ("loss", "largest", "smallest") for part in ("first", "last")]
        print(f"| {name} | {' | '.join(map(str, cells))} |")
    if args.out is not None:
        machine = {"processors": os.cpu_count(), "load before": round(load, 1), "torch": torch.__version__}
        machine["python"] = platform.python_version()
        args.out.write_text(json.dumps({"steps": args.steps, "machine": machine, "ways": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
