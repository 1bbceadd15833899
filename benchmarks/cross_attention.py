"""Llama 3.2 Vision's layers that attend to pictures, in megavlm and in Transformers, per text token and image feature.

The same weights on the same samples, forward and backward in one process, in turns: here in one pack, there in a batch
that is padded to the longest sample and, as its processor does, to four tiles a picture. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
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
from torch import Tensor  # noqa: E402
from turns import Answer, in_turns, median, quotient, timed  # noqa: E402

from megavlm.config.schema import ParallelConfig  # noqa: E402
from megavlm.layers.cross import tell_pictures  # noqa: E402
from megavlm.layers.segments import packed_segments  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402

OURS, THEIRS = "megavlm", "Transformers"
TILES = 4
GOAL = 0.95
"""Throughput of megavlm over theirs, where neither pads."""


@dataclass(frozen=True)
class Sizes:
    """Of the layer: the 11B's, each divided by 4 but the width of a head; and the features of a tile."""

    hidden: int = 1024
    ffn: int = 3584
    heads: int = 8
    groups: int = 2
    head: int = 128
    tile: int = 1601


@dataclass(frozen=True)
class Case:
    """Samples that begin with their picture."""

    about: str
    samples: tuple[tuple[int, int], ...]
    """Tokens of the text, and tiles of the picture."""


CASES = {
    "no padding": Case("one sample of 512 tokens, a picture of 4 tiles", ((512, 4),)),
    "much text": Case("one sample of 2048 tokens, a picture of 4 tiles", ((2048, 4),)),
    "one tile": Case("one sample of 512 tokens, a picture of 1 tile", ((512, 1),)),
    "samples of all sizes": Case(
        "samples of 128, 256, 512 and 1152 tokens, pictures of 1, 2, 4 and 4 tiles",
        ((128, 1), (256, 2), (512, 4), (1152, 4)),
    ),
}


class Megavlm:
    """A layer of megavlm on a pack."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.layer = llama_layer({
            "hidden_size": sizes.hidden, "ffn_hidden_size": sizes.ffn, "num_attention_heads": sizes.heads,
            "num_query_groups": sizes.groups, "kv_channels": sizes.head, "max_position_embeddings": 8192,
            "cross_attention_layers": (0,),
        })  # fmt: skip

    def ready(self, texts: list[Tensor], pictures: list[Tensor]) -> Callable[[], Tensor]:
        """Return what runs the layer on samples [S, E] and their features [F, E], and returns [all S, E]."""
        bounds = np.cumsum([0, *map(len, texts)])
        spans = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        packed = packed_segments(bounds.astype(np.int32), CPU, spans=spans)
        tell_pictures(packed, list(map(len, pictures)))

        def run() -> Tensor:
            x, features = torch.cat(texts).unsqueeze(1), torch.cat(pictures).unsqueeze(1)
            found = self.layer(hidden_states=x, attention_mask=None, context=features, packed_seq_params=packed)
            return found[0].squeeze(1)

        return run


class Transformers:
    """A layer of ``MllamaTextModel`` on a padded batch."""

    def __init__(self, sizes: Sizes) -> None:
        from transformers.models.mllama.configuration_mllama import MllamaTextConfig
        from transformers.models.mllama.modeling_mllama import MllamaTextModel

        self.sizes = sizes
        config = MllamaTextConfig(
            hidden_size=sizes.hidden, intermediate_size=sizes.ffn, num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.groups, num_hidden_layers=1, cross_attention_layers=[0], vocab_size=128,
            pad_token_id=0,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        self.layer = MllamaTextModel(config).layers[0].train()

    def ready(self, texts: list[Tensor], pictures: list[Tensor]) -> Callable[[], Tensor]:
        """Return what runs the layer on the same, and returns the same."""
        from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask

        longest, tile = max(map(len, texts)), self.sizes.tile
        shown = torch.zeros(len(texts), longest, 1, TILES)
        for row, picture in enumerate(pictures):
            shown[row, :, :, : len(picture) // tile] = 1
        mask, rows = _prepare_cross_attention_mask(shown, tile, torch.float32)

        def padded(parts: list[Tensor], length: int) -> Tensor:
            return torch.stack([torch.nn.functional.pad(one, (0, 0, 0, length - len(one))) for one in parts])

        def run() -> Tensor:
            found = self.layer(
                hidden_states=padded(texts, longest), cross_attention_states=padded(pictures, TILES * tile),
                cross_attention_mask=mask, attention_mask=None, full_text_row_masked_out_mask=rows,
            )  # fmt: skip
            return torch.cat([one[: len(text)] for one, text in zip(found, texts, strict=True)])

        return run


def mapped(state: dict[str, Tensor], groups: int) -> dict[str, Tensor]:
    """Return Transformers' tensors in our names and layouts."""
    pairs = [state[f"cross_attn.{name}_proj.weight"].unflatten(0, (groups, -1)) for name in "kv"]
    return {
        "input_layernorm.weight": state["input_layernorm.weight"],
        "pre_mlp_layernorm.weight": state["post_attention_layernorm.weight"],
        "cross_attention.linear_q.weight": state["cross_attn.q_proj.weight"],
        "cross_attention.linear_kv.weight": torch.cat(pairs, dim=1).flatten(0, 1),
        "cross_attention.q_layernorm.weight": state["cross_attn.q_norm.weight"],
        "cross_attention.k_layernorm.weight": state["cross_attn.k_norm.weight"],
        "cross_attention.linear_proj.weight": state["cross_attn.o_proj.weight"],
        "cross_attn_bda.gate": state["cross_attn_attn_gate"],
        "mlp.linear_fc1.weight": torch.cat([state["mlp.gate_proj.weight"], state["mlp.up_proj.weight"]]),
        "mlp.linear_fc2.weight": state["mlp.down_proj.weight"],
        "mlp_bda.gate": state["cross_attn_mlp_gate"],
    }


def sides(sizes: Sizes) -> dict[str, Any]:
    """Return both systems, with the same weights and open gates; process groups must be up."""
    theirs, ours = Transformers(sizes), Megavlm(sizes)
    with torch.no_grad():
        for parameter in theirs.layer.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.size(1) ** -0.5)
            elif parameter.numel() > 1:
                parameter.normal_(1, 0.1)
            else:
                parameter.fill_(0.7)
        weights = mapped(dict(theirs.layer.named_parameters()), sizes.groups)
        own = dict(ours.layer.named_parameters())
        assert own.keys() == weights.keys(), own.keys() ^ weights.keys()
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    return {OURS: ours, THEIRS: theirs}


def inputs(case: Case, sizes: Sizes) -> tuple[list[Tensor], list[Tensor]]:
    """Return the samples' texts [S, E] and features [F, E]."""
    generator = torch.Generator().manual_seed(1)

    def some(rows: int) -> Tensor:
        return torch.randn(rows, sizes.hidden, generator=generator).requires_grad_()

    return [some(tokens) for tokens, _ in case.samples], [some(tiles * sizes.tile) for _, tiles in case.samples]


def run(system: Any, work: Callable[[], Tensor], leaves: list[Tensor], weight: Tensor) -> Answer:
    """Return the seconds of a forward and a backward pass, whose gradients stay on ``leaves``."""
    system.layer.zero_grad(set_to_none=True)
    for leaf in leaves:
        leaf.grad = None
    return timed(lambda: work().backward(weight))


def check_same(works: dict[str, Callable[[], Tensor]], leaves: list[Tensor], weight: Tensor) -> float:
    """Return how far outputs and gradients of inputs differ, of the largest; end the run where that is not rounding."""
    found = []
    for work in works.values():
        for leaf in leaves:
            leaf.grad = None
        output = work()
        output.backward(weight)
        found.append([output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
    if apart > 1e-4:
        sys.exit(f"the sides do not compute the same: they differ by {apart:.2g}")
    return apart


def measure(sizes: Sizes, names: list[str], rounds: int) -> dict[str, Any]:
    """Return by case the answers of every round of each side, and how far they differ; process groups must be up."""
    both, result = sides(sizes), {}
    for name in names:
        texts, pictures = inputs(CASES[name], sizes)
        leaves, weight = [*texts, *pictures], torch.randn(sum(map(len, texts)), sizes.hidden)
        works = {side: system.ready(texts, pictures) for side, system in both.items()}
        apart = check_same(works, leaves, weight)
        calls = {side: partial(run, both[side], work, leaves, weight) for side, work in works.items()}
        result[name] = {
            "tokens": len(weight), "features": sum(map(len, pictures)), "apart": apart,
            "sides": in_turns(name, calls, rounds),
        }  # fmt: skip
    return result


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of a result."""
    lines = ["| case | side | ms | us per text token | us per image feature |", "|---|---|---|---|---|"]
    for name, one in result.items():
        for side, answers in one["sides"].items():
            seconds = median(answers)
            each = [1e6 * seconds / one[key] for key in ("tokens", "features")]
            lines.append(f"| {name} | {side} | {1000 * seconds:.0f} | {each[0]:.0f} | {each[1]:.0f} |")
    lines += ["", "| case | megavlm against Transformers | the same, processor time | goal |", "|---|---|---|---|"]
    for name, one in result.items():
        theirs, ours = one["sides"][THEIRS], one["sides"][OURS]
        clock, cpu = (quotient(theirs, ours, key) for key in ("seconds", "cpu_seconds"))
        lines.append(f"| {name} | {clock:.2f}x | {cpu:.2f}x | {f'{GOAL}x' if name == 'no padding' else ''} |")
    return "\n".join([*lines, "", *(f"- **{name}**: {CASES[name].about}." for name in result)])


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES])
    asked, where = arguments_of(parser), machine()
    command = " ".join(["python", "benchmarks/cross_attention.py", *sys.argv[1:]])
    with process_groups(ParallelConfig(), seed=1):
        found = measure(Sizes(), asked.cases, asked.rounds)
    apart = max(one["apart"] for one in found.values())
    words = f"Outputs and gradients of inputs differ by {apart:.1e} of the largest at most."
    print("\n".join([*told(asked, where, command), words, "", table(found)]))
    write(asked, {"command": command, "machine": where, "cases": found})


if __name__ == "__main__":
    main()
