"""Pictures cut to tiles against squares with as many patches, through reader, tower and fusion; InternVL's conversion.

Tiles: pictures are laid out by an image plan from their headers, decoded to views, encoded, arranged for the language
model, and the tower trains on them (forward and backward). Squares: as many pictures as there are views, one view each,
through the same. Both sides in turns; the table has the median of each side, and the median of the ratios of each turn.

Conversion: a directory in the layout and width of InternVL3-8B (Qwen2.5-7B, InternViT-300M; random bf16), with as few
layers as the disk allows, into a Megatron checkpoint and back without reading back, against ``cp -r`` with a flush.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from megavlm.parallel.device import prepare_device  # noqa: E402

prepare_device()

import torch  # noqa: E402
from data_path import machine, make_pictures  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from megavlm.checkpoint.hf.shapes import alone, family_slots, make_rules  # noqa: E402
from megavlm.config.load import load_recipe  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.decode import ImageDecoder  # noqa: E402
from megavlm.data.decoders import make_decoder  # noqa: E402
from megavlm.data.images import lay_out  # noqa: E402
from megavlm.data.media import ImagePlan, arrange, plan_of  # noqa: E402
from megavlm.evaluation.parity import arrangement_on  # noqa: E402
from megavlm.families.known import FAMILIES  # noqa: E402
from megavlm.families.presets import expand_presets  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402

PRESETS = {"anyres": "llava_1_6_vicuna_7b", "anyres_max": "llava_onevision_0_5b", "dynamic_tiles": "internvl3_2b"}
"""Whose plan, and whose tower's picture and patch size, are taken; layers and widths are small."""
SMALL = (
    "model.vision.num_layers=2", "model.vision.hidden_size=64", "model.vision.num_attention_heads=2",
    "model.vision.ffn_hidden_size=256", "model.language.num_layers=1", "model.language.hidden_size=256",
    "model.language.num_attention_heads=4", "model.language.num_query_groups=4", "model.language.kv_channels=64",
    "model.language.ffn_hidden_size=256", "model.language.vocab_size=512", "training.precision=fp32",
    "parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1",
    "parallel.sequence_parallel=false", "modules.vision.freeze=false",
)  # fmt: skip
PARTS = ("reader", "tower", "both")


def recipe_of(preset: str) -> Recipe:
    """Return a small model with the plan, the side and the patches of a preset."""
    return load_recipe("internvl3_8b/sft", [f"model={{preset: {preset}}}", *SMALL], expand_presets)


class Side:
    """One side of the comparison: pictures, as one plan has them.

    Args:
        model: whose tower, connector and fusion are taken.
        decoder: decodes.
        files: the pictures.
        plan: None squashes each to one view.
    """

    def __init__(
        self, model: Any, decoder: ImageDecoder, files: list[bytes], plan: ImagePlan | None, side: int
    ) -> None:
        self.model, self.decoder, self.files, self.plan, self.side = model, decoder, files, plan, side
        self.pixels = self.read()

    def read(self) -> torch.Tensor:
        """Lay the pictures out and decode their views."""
        if self.plan is None:
            return self.decoder.decode(self.files, self.side).pixels
        self.layouts = [lay_out([file], self.plan)[0] for file in self.files]  # each in a conversation of its own
        return self.decoder.decode(self.files, self.plan, self.layouts).pixels

    def train(self, pixels: torch.Tensor) -> None:
        """Encode views, arrange their features, and go back."""
        features = self.model.encode_images(pixels)
        index, weight = None, None
        if self.plan is not None:
            index, weight = arrangement_on(arrange(self.plan, self.layouts), pixels.device)
        self.model.arranged(features, index, weight).square().mean().backward()

    def measure(self) -> dict[str, float]:
        """Return the seconds of each part."""
        start = time.perf_counter()
        pixels = self.read()
        read = time.perf_counter() - start
        self.train(pixels)
        both = time.perf_counter() - start
        return {"reader": read, "tower": both - read, "both": both}


def compare(preset: str, pictures: list[bytes], rounds: int) -> dict[str, Any]:
    """Measure a plan against squares, in turns, after a turn that does not count."""
    recipe = recipe_of(preset)
    plan, side = plan_of(recipe.model), recipe.model.vision.image_size
    with alone():
        model = unwrap(build_model(recipe, 5)[0])
        decoder = make_decoder("simplejpeg")
        tiles = Side(model, decoder, pictures, plan, side)
        views = len(tiles.pixels)
        squares = Side(model, decoder, [pictures[i % len(pictures)] for i in range(views)], None, side)
        assert len(squares.pixels) == views
        taken: dict[str, list[dict[str, float]]] = {"tiles": [], "squares": []}
        for _ in range(1 + rounds):
            for name, one in (("tiles", tiles), ("squares", squares)):
                taken[name].append(one.measure())
    patches = views * recipe.model.vision.patches_per_image
    found: dict[str, Any] = {
        "images": len(pictures),
        "views": views,
        "patches": patches,
        "plan": recipe.model.image.kind,
    }
    for part in PARTS:
        ours, plain = ([one[part] for one in taken[name][1:]] for name in ("tiles", "squares"))
        found[part] = {
            "images_per_s": len(pictures) / median(ours), "patches_per_s": patches / median(ours),
            "squares_patches_per_s": patches / median(plain),
            "ratio": median(b / a for a, b in zip(ours, plain, strict=True)),
        }  # fmt: skip
    return found


def make_internvl(directory: Path, layers: int) -> int:
    """Write an InternVL3-8B of fewer layers in its authors' layout; return its bytes."""
    words = [f"model.language.num_layers={layers}", f"model.vision.num_layers={layers}"]
    words += ["parallel.pipeline_model_parallel_size=1"]
    model = load_recipe("internvl3_8b/sft", words, expand_presets).model
    family = FAMILIES["internvl_chat"]
    with alone():
        rules = make_rules(family, model, "published", family_slots(family, model))
    directory.mkdir()
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(1)).bfloat16()
    state, total, weight_map = dict[str, torch.Tensor](), 0, dict[str, str]()
    shapes = [(name, shape) for rule in rules for name, shape in zip(rule.row.theirs, rule.shapes, strict=True)]
    files = list[str]()
    for number, (name, shape) in enumerate(shapes):
        size = torch.Size(shape).numel()
        state[name] = block.repeat(-(-size // len(block)))[:size].reshape(shape)
        if number == len(shapes) - 1 or sum(one.nbytes for one in state.values()) > 1_500_000_000:
            files.append(f"model-{len(files) + 1:05d}.safetensors")
            save_file(state, directory / files[-1], metadata={"format": "pt"})
            total += sum(one.nbytes for one in state.values())
            weight_map |= dict.fromkeys(state, files[-1])
            state = {}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(family.config(dataclasses.replace(model, preset=None), {})))
    return total


def timed(work: Callable[[], object], *gone: Path) -> float:
    """Return the seconds of ``work`` until all is on disk; what it writes goes to ``gone``, and is removed."""
    os.sync()
    start = time.perf_counter()
    work()
    os.sync()
    seconds = time.perf_counter() - start
    for path in gone:
        shutil.rmtree(path)
    return seconds


def convert(layers: int, rounds: int, work: Path | None) -> dict[str, Any]:
    """Time both directions and ``cp`` in turns."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        root = Path(folder)
        size = make_internvl(root / "hf", layers)
        command = [sys.executable, "-m", "megavlm", "convert"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}

        def run(*words: object) -> None:
            subprocess.run([*command, *map(str, words)], check=True, env=env, capture_output=True)

        def there(out: Path) -> None:
            run("hf-to-megatron", "--hf", root / "hf", "--out", out, "--no-verify")

        there(root / "kept")
        taken: dict[str, list[float]] = {"cp": [], "in": [], "out": []}
        for _ in range(rounds):
            taken["cp"].append(
                timed(lambda: subprocess.run(["cp", "-r", root / "hf", root / "cp"], check=True), root / "cp")
            )
            taken["in"].append(timed(lambda: there(root / "m"), root / "m"))
            words = ("megatron-to-hf", "--megatron", root / "kept", "--out", root / "back", "--no-verify")
            taken["out"].append(timed(lambda words=words: run(*words), root / "back"))  # type: ignore[misc]
    found: dict[str, Any] = {"layers": layers, "bytes": size, "cp": median(taken["cp"])}
    for way in ("in", "out"):
        ratios = [a / b for a, b in zip(taken[way], taken["cp"], strict=True)]
        found[way] = {"seconds": median(taken[way]), "ratio": median(ratios)}
    return found


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of a result."""
    where = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items())
    lines = [
        f"Machine: {where['cpu']}, {where['cores']} cores, {where['threads']} torch thread(s), load "
        f"{where['load_average_before']:.1f} before the start. Python {where['python']}, {packages}.",
        f"Command: `{result['command']}` ({result['seconds']:.0f} s)",
        "",
        "| plan | views a picture | part | images/s | patches/s | squares, patches/s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result["tiles"]:
        for part in PARTS:
            row = one[part]
            lines.append(
                f"| `{one['plan']}` | {one['views'] / one['images']:.1f} | {part} | {row['images_per_s']:.1f} | "
                f"{row['patches_per_s']:,.0f} | {row['squares_patches_per_s']:,.0f} | {row['ratio']:.2f} |"
            )
    if "convert" in result:
        one = result["convert"]
        lines += ["", "| way | seconds | of cp |", "|---|---|---|", f"| `cp -r` + flush | {one['cp']:.1f} | |"]
        for way, name in (("in", "hf_to_megatron"), ("out", "megatron_to_hf")):
            lines.append(f"| {name}, `--no-verify` | {one[way]['seconds']:.1f} | {one[way]['ratio']:.2f}x |")
        lines.append(f"({one['bytes'] / 1e9:.2f} GB, {one['layers']} layers)")
    return "\n".join(lines)


def main() -> int:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description="Tiles against squares, and InternVL's conversion against cp.")
    parser.add_argument("--pictures", type=int, default=6, help="of each plan (default 6)")
    parser.add_argument("--rounds", type=int, default=7, help="turns that count (default 7)")
    parser.add_argument("--layers", type=int, default=0, help="of the converted model; 0 converts none (default)")
    parser.add_argument("--convert-rounds", type=int, default=3, help="turns of the conversion (default 3)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the converted model lies for a while")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON as well")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    start, result = time.perf_counter(), {"machine": machine()}
    pictures = make_pictures(arguments.pictures)
    result["tiles"] = [compare(preset, pictures, arguments.rounds) for preset in PRESETS.values()]
    if arguments.layers:
        result["convert"] = convert(arguments.layers, arguments.convert_rounds, arguments.work)
    result["seconds"] = time.perf_counter() - start
    script = Path(sys.argv[0])
    result["command"] = shlex.join(["python", str(Path(script.parent.name) / script.name), *sys.argv[1:]])
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
