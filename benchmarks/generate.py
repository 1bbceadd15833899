"""Tokens per second of generation against Transformers' ``generate`` on the same exported weights, on the CPU.

``python benchmarks/generate.py``: a LLaVA of CLIP and Llama, random weights, made with Transformers and converted with
``megavlm convert``. Both answer the same prompts with the same images greedily, in one process, with the same number of
threads, in turns. Seconds are processor time, as the machine may be shared. Prefill is a call for one new token, decode
what more tokens cost. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from megavlm.parallel.device import prepare_device  # noqa: E402

prepare_device()

import torch  # noqa: E402
from transformers import (  # noqa: E402
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from megavlm.checkpoint.distributed import load  # noqa: E402
from megavlm.cli import main as megavlm  # noqa: E402
from megavlm.config.load import load_recipe  # noqa: E402
from megavlm.families.presets import expand_presets  # noqa: E402
from megavlm.inference.generate import generate  # noqa: E402
from megavlm.inference.prompt import Prompt  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402

VOCABULARY = 4096
IMAGE = VOCABULARY - 1
SIDE, PATCH = 112, 14


def make(hidden: int, layers: int) -> LlavaForConditionalGeneration:
    """Return a model with random weights."""
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=2048,
    )  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
                              image_size=SIDE, patch_size=PATCH)  # fmt: skip
    torch.manual_seed(1)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config).eval()


def questions(count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [count, length] prompts that show an image each, and [count, 3, SIDE, SIDE] pixels."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, IMAGE, (count, length), generator=generator)
    ids[:, 2 : 2 + (SIDE // PATCH) ** 2] = IMAGE
    return ids, torch.randn(count, 3, SIDE, SIDE, generator=generator)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that ``work`` takes, and what it gives."""
    start = time.process_time()
    given = work()
    return time.process_time() - start, given


def sides(model: LlavaForConditionalGeneration, chunks: list[Any]) -> dict[str, Callable[..., Any]]:
    """Return both systems: a function of prompts, pixels and new tokens that gives the answers."""

    def theirs(ids: torch.Tensor, pixels: torch.Tensor, new: int) -> list[list[int]]:
        whole = model.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), do_sample=False,
                               max_new_tokens=new, eos_token_id=None, pad_token_id=0)  # fmt: skip
        return whole[:, ids.size(1) :].tolist()

    def ours(ids: torch.Tensor, pixels: torch.Tensor, new: int) -> list[list[int]]:
        prompts = [Prompt(row.numpy(), image[None]) for row, image in zip(ids, pixels, strict=True)]
        length = max(len(ids) * ids.size(1), ids.size(1) + new)
        with torch.inference_mode():  # as megavlm generate does
            return generate(chunks, prompts, max_new_tokens=new, stop_ids=[], vocab_size=VOCABULARY, pack_length=length)

    return {"megavlm": ours, "Transformers": theirs}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=192, help="tokens of a prompt, 64 of them an image")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make(args.hidden, args.layers)
        model.save_pretrained(folder / "hf")
        assert megavlm(["convert", "hf-to-megatron", "--hf", str(folder / "hf"), "--out", str(folder / "m")]) == 0
        recipe = load_recipe(folder / "m" / "recipe.yaml", [], expand_presets)
        with process_groups(recipe.parallel, 1):
            chunks = build_model(recipe, IMAGE)
            load(folder / "m", modules=[unwrap(chunk) for chunk in chunks])
            systems = sides(model, chunks)
            print(
                f"Llama of {args.layers} x {args.hidden}, fp32, prompts of {args.prompt} tokens with an image, "
                f"{args.new} new tokens, {args.threads} thread(s), processor time, medians of {args.rounds} rounds, "
                f"load {os.getloadavg()[0]:.1f}; " + ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers"))
            )
            print("\n| prompts at once | | megavlm | Transformers | ratio |\n|---|---|---|---|---|")
            for count in (1, 8):
                print_rows(count, measure(systems, questions(count, args.prompt), args), args)


def measure(
    systems: dict[str, Callable[..., Any]], asked: tuple[torch.Tensor, torch.Tensor], args: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """Return seconds of prefill and of the further tokens, per round and system; the answers must be equal."""
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for turn in range(args.rounds + 1):
        answers = []
        for name, system in systems.items():
            first, _ = timed(lambda system=system: system(*asked, 1))
            whole, given = timed(lambda system=system: system(*asked, args.new))
            answers.append(given)
            if turn:  # the first round warms up
                rows[name].append((first, whole - first))
        assert answers[0] == answers[1], "the answers differ"
    return rows


def print_rows(count: int, rows: dict[str, list[tuple[float, float]]], args: argparse.Namespace) -> None:
    """Print tokens per second of prefill and decode, and the median ratio over the rounds."""
    for k, (what, tokens) in enumerate((("prefill", count * args.prompt), ("decode", count * (args.new - 1)))):
        rates = {name: [tokens / pair[k] for pair in pairs] for name, pairs in rows.items()}
        ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
        figures = " | ".join(f"{statistics.median(values):,.0f} tok/s" for values in rates.values())
        print(f"| {count} | {what} | {figures} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
