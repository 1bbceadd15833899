"""Short trainings whose losses and gradient norms are kept: what a change that moves code must not change.

They go the way of users alone (``megavlm prepare``, ``convert``, ``train``; ``metrics.jsonl``), so that one file of
cases runs in today's tree and in that of an older commit, whose ``tests/ranks.py`` and package it then imports::

    python tests/golden/cases.py ROOT OUT.json [NAME ...]

All weights and data come from fixed seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SHARED = Path("shared") / "reference" / "qwenvl-tiny"
"""Beside the repository, where it is present."""
Measured = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One training.

    Args:
        recipe: a shipped recipe, or the recipe of what ``start`` has converted.
        ranks: processes.
        layout: in words.
        overrides: keys of the recipe; ``{root}`` is the directory of all cases.
        convert: writes a Hugging Face directory that is converted first; returns why it cannot, or None.
        after: a case whose checkpoint it needs.
    """

    recipe: str
    ranks: int
    layout: str
    overrides: tuple[str, ...]
    convert: Callable[[Path, Path], str | None] | None = field(default=None, repr=False)
    after: str | None = None


def shared_qwen_vl(directory: Path, repository: Path) -> str | None:
    """Copy the tiny Qwen-VL that the original code gave reference numbers for; a git worktree asks beside the first."""
    words = ["git", "-C", str(repository), "rev-parse", "--path-format=absolute", "--git-common-dir"]
    common = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    places = [repository.parent / SHARED, *([Path(common).parent.parent / SHARED] if common else [])]
    source = next((place for place in places if place.is_dir()), None)
    if source is None:
        return f"no reference checkpoint in {SHARED} beside the repository"
    shutil.copytree(source, directory, copy_function=shutil.copyfile)
    return None


def llava(directory: Path, _: Path) -> str | None:
    """Write a LLaVA of Transformers: CLIP, grouped queries, features of the layer before the last."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=511))
    rng = np.random.default_rng(11)  # the same numbers with every torch
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            values = around + 0.1 * rng.standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    model.save_pretrained(directory)
    squashed = {"do_center_crop": False, "size": {"height": 28, "width": 28}}
    pixels = {"image_processor_type": "CLIPImageProcessor", **squashed}
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels))
    return None


# The rates of the first 20 of 1100 steps: the warm-up of 40 steps to 1e-3 is that of 19 steps to 19/40 of it.
_WARM_UP = ("training.train_steps=20", "optimizer.warmup_steps=19", "optimizer.lr=4.75e-4")
_ALONE = tuple(
    f"parallel.{key}" for key in
    ("tensor_model_parallel_size=1", "pipeline_model_parallel_size=1", "sequence_parallel=false")
)  # fmt: skip
_SHORT = ("training.train_steps=4", "optimizer.warmup_steps=1")
_ADAPTERS = (*_ALONE, *_SHORT, "checkpoint.load={root}/alone")
_CONVERTED = (
    *_SHORT, "data.sequence_length=384", "data.num_workers=0", "training.global_batch_size=2",
    "training.precision=fp32", "optimizer.lr=1e-3",
)  # fmt: skip
CASES: dict[str, Case] = {
    "quickstart": Case("quickstart", 4, "TP 2 x PP 2 + SP", _WARM_UP),
    "alone": Case("quickstart", 1, "one process", (*_ALONE, *_SHORT)),
    "vpp": Case(
        "quickstart", 4, "DP 2 x PP 2 x VPP 2, overlapped",
        (
            "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false",
            "parallel.virtual_pipeline_model_parallel_size=2", "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true", "training.global_batch_size=4", *_SHORT,
        ),
    ),
    "lora": Case("quickstart_lora", 1, "one process", _ADAPTERS, after="alone"),
    "qlora": Case("quickstart_lora", 1, "one process", (*_ADAPTERS, "lora.quantize=nf4"), after="alone"),
    "qwen_vl": Case("converted", 1, "one process", _CONVERTED, convert=shared_qwen_vl),
    "llava": Case("converted", 1, "one process", _CONVERTED, convert=llava),
}  # fmt: skip


def measure(root: Path, repository: Path, names: Sequence[str] = tuple(CASES)) -> dict[str, Measured]:
    """Run cases.

    Args:
        root: an empty directory to work in.
        repository: the tree that is measured; its ``tests`` must be importable.
        names: which; those that they need are run as well.

    Returns:
        Of each: what it was, ``loss`` and ``grad_norm`` of each step; or ``skipped``, the reason.
    """
    make_data(root)
    wanted = [name for name in CASES if name in names or any(CASES[n].after == name for n in names)]
    return {name: _run(name, CASES[name], root, repository) for name in wanted}


def make_data(root: Path) -> None:
    """Render a small data set, as the quickstart does; train a tokenizer; prepare."""
    from ranks import megavlm

    from megavlm.data.tokenizer import train_sentencepiece
    from megavlm.quickstart.render import render_dataset

    rendered = render_dataset(root / "raw", train_images=160, heldout_images=12, seed=1)
    records = json.loads(rendered.train_json.read_text())
    texts = [f"{turn['from']}\n{turn['value']}" for record in records for turn in record["conversations"]]
    train_sentencepiece(texts, root / "tokenizer.model", 448)
    megavlm(["prepare", rendered.train_json, f"--images={rendered.images_dir}", f"--out={root / 'train'}"])


def _run(name: str, case: Case, root: Path, repository: Path) -> Measured:
    """Run one; its run's directory is ``root/name``."""
    from ranks import megavlm

    found: Measured = {"recipe": case.recipe, "ranks": case.ranks, "layout": case.layout, **_surroundings()}
    found["overrides"] = list(case.overrides)
    recipe = case.recipe
    if case.convert is not None:
        reason = case.convert(root / f"{name}-hf", repository)
        if reason is not None:
            return {**found, "skipped": reason}
        megavlm(["convert", "hf-to-megatron", "--hf", root / f"{name}-hf", "--out", root / f"{name}-m"])
        recipe = str(root / f"{name}-m" / "recipe.yaml")
    words = [
        f"output_dir={root / name}", f"data.train.0.path={root / 'train'}", "data.validation=[]",
        f"data.tokenizer={root / 'tokenizer.model'}", "logging.log_interval=1", "logging.panel_interval=null",
        "training.validation_interval=null", *(word.format(root=root) for word in case.overrides),
    ]  # fmt: skip
    megavlm(["train", recipe, *words], world=case.ranks)
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [*range(1, len(steps) + 1)], steps
    return {**found, "loss": [line["loss"] for line in steps], "grad_norm": [line["grad_norm"] for line in steps]}


def _surroundings() -> Mapping[str, Any]:
    """Return versions and machine."""
    import torch

    packages = ("megavlm", "torch", "megatron-core", "numpy", "transformers", "sentencepiece", "pillow")
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": f"{model or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def main() -> None:
    """Measure a tree and write it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=list(CASES))
    args = parser.parse_args()
    root = args.root.resolve()
    sys.path[:0] = [str(root), str(root / "tests")]
    with tempfile.TemporaryDirectory(prefix="golden-") as work:
        args.out.write_text(json.dumps(measure(Path(work), root, args.names)))


if __name__ == "__main__":
    main()
