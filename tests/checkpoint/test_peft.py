"""Adapters in PEFT's format compute in PEFT what they compute here, come back bit for bit, and merge."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from family_cases import QWEN_VL, llava, llava_qwen_siglip, qwen_vl
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from megavlm.checkpoint.distributed import load
from megavlm.checkpoint.saver import Saver, State
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.cli import main
from megavlm.config.help import to_yaml
from megavlm.config.load import load_recipe
from megavlm.evaluation.parity import Sample, _batch
from megavlm.models.build import build_model, unwrap
from megavlm.models.registry import expand_presets
from megavlm.parallel.state import process_groups

IMAGE = 119
TOLERANCE = 2e-5
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["v_proj", "q_proj", "up_proj"]
CASES = {
    "llama-all": (llava, ALL, []),
    "llama-some": (llava, SOME, ["lora.train_embeddings=true", "lora.train_head=true"]),
    "qwen2-some": (llava_qwen_siglip, [*SOME, "down_proj"], []),
}


def sample() -> Sample:
    """Return text with two images of 16 patches."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, IMAGE, (50,), generator=generator)
    ids[3:19] = ids[22:38] = IMAGE
    return Sample("s0", ids, torch.randn(2, 3, 28, 28, generator=generator), None, {})


def convert(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def adapted(base: Path, root: Path, targets: Sequence[str], more: Sequence[str]) -> Path:
    """Save adapters of random values for ``base``, as a run with these targets would."""
    words = ["lora.rank=4", "lora.alpha=6", f"lora.targets=[{','.join(targets)}]", f"checkpoint.load={base}",
             "modules.vision.freeze=true", "modules.connector.freeze=true", *more]  # fmt: skip
    recipe = load_recipe(base / "recipe.yaml", words, expand_presets)
    with process_groups(recipe.parallel, 1):
        model = unwrap(build_model(recipe, IMAGE)[0])
        load(base, modules=[model])
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b"):
                    parameter.normal_(std=0.2)
                elif parameter.requires_grad and not name.endswith("lora_a"):
                    parameter.mul_(1.5)
        state = State([model], run={"step": 1}, recipe_yaml=to_yaml(recipe), parent=base, base=base)
        saved = Saver(root, keep=1).save(state)
        assert saved is not None
        return saved


def ours(checkpoint: Path, one: Sample) -> Tensor:
    """Return the logits of a checkpoint."""
    recipe = load_recipe(checkpoint / "recipe.yaml", [], expand_presets)
    with process_groups(recipe.parallel, 1), torch.no_grad():
        model = unwrap(build_model(recipe, IMAGE)[0]).eval()
        load(checkpoint, modules=[model])
        batch = _batch(one, 1)
        return model(batch.tokens, batch.position_ids, batch.packed_seq_params, images=batch.images)[0, :, :120]


def theirs(model: torch.nn.Module, one: Sample) -> Tensor:
    with torch.no_grad():
        return model(
            input_ids=one.ids[None], pixel_values=one.pixels, attention_mask=torch.ones(1, len(one.ids))
        ).logits[0]


def read(directory: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_same(name: str, tmp_path: Path) -> None:
    make, targets, more = CASES[name]
    hf, base, one = tmp_path / "hf", tmp_path / "base", sample()
    make().save_pretrained(hf)
    convert("hf-to-megatron", "--hf", hf, "--out", base)
    saved = adapted(base, tmp_path / "run", targets, more)
    expected = ours(saved, one)
    assert (expected - ours(base, one)).abs().max() > 0.01  # the adapters matter

    convert("megatron-to-hf", "--megatron", saved, "--adapter", "--out", tmp_path / "peft")
    both = PeftModel.from_pretrained(read(hf), tmp_path / "peft").eval()
    close(theirs(both, one), expected)

    convert("megatron-to-hf", "--megatron", saved, "--out", tmp_path / "whole")
    close(theirs(read(tmp_path / "whole"), one), expected)

    convert("merge", "--megatron", saved, "--out", tmp_path / "merged")
    close(ours(tmp_path / "merged", one), expected)

    convert("hf-to-megatron", "--adapter", tmp_path / "peft", "--base", base, "--out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(saved)
    close(ours(tmp_path / "back", one), expected)


def bits(checkpoint: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return every tensor of a checkpoint of adapters, without what pads a vocabulary."""
    from megavlm.checkpoint.slots import Slot

    reader, found = CheckpointReader(checkpoint), {}
    for key, entry in reader.tensors().items():
        padded = key.endswith(("word_embeddings.weight", "output_layer.weight"))
        shape = (120, *entry.size[1:]) if padded else tuple(entry.size)
        value = reader.read(Slot(key, shape, vocabulary=padded))
        found[key] = (list(value.shape), value.flatten().tolist())
    return found
