"""Our model computes what Qwen-VL's code computes.

Two links: our model against ``qwen_reference.py`` with random weights, always; and both against logits and losses
that the original code gave for ``shared/reference/qwenvl-tiny`` (beside the repository), where that is present.
Tolerances: 1e-4 of the largest logit and 1e-5 of a loss in fp32; the sums are made in another order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import qwen_reference
import torch
import torch.nn.functional as F
from qwen_reference import Sizes, State
from safetensors.torch import load_file
from tiny import tiny_recipe
from torch import Tensor

from megavlm.data.batch import IGNORE_INDEX, Pack
from megavlm.data.device_batch import Batch, make_batch
from megavlm.models.build import build_model, unwrap
from megavlm.models.vlm import VisionLanguageModel

pytestmark = pytest.mark.family("qwen_vl")
LOGITS, LOSS = 1e-4, 1e-5
SHARED = Path(__file__).resolve().parents[3] / "shared" / "reference" / "qwenvl-tiny"
needs_shared = pytest.mark.skipif(
    not (SHARED / "reference.safetensors").is_file(), reason=f"no reference checkpoint in {SHARED}"
)

# Odd sizes on purpose: the tower has another head width than the language model, and tables are interpolated.
SMALL = Sizes(
    vocab=120, hidden=128, layers=2, heads=4, ffn=88, image=28, patch=7, width=40, vision_layers=2, vision_heads=5,
    vision_ffn=56, queries=9, rows=25, image_token=117,
)  # fmt: skip


def shared_sizes() -> Sizes:
    """Return the sizes of the shared checkpoint."""
    config: dict[str, Any] = json.loads((SHARED / "config.json").read_text())
    visual = config["visual"]
    return Sizes(
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        ffn=config["intermediate_size"] // 2,
        image=visual["image_size"],
        patch=visual["patch_size"],
        width=visual["width"],
        vision_layers=visual["layers"],
        vision_heads=visual["heads"],
        vision_ffn=int(visual["width"] * visual["mlp_ratio"]),
        queries=visual["n_queries"],
        rows=256,
        image_token=visual["image_start_id"] + 2,
    )


def ours_from(state: State, s: Sizes) -> dict[str, Tensor]:
    """Map a checkpoint to our parameters, by hand: an account of every layout, apart from the converter's."""
    out = {
        "language.embedding.word_embeddings.weight": state["transformer.wte.weight"],
        "language.decoder.final_layernorm.weight": state["transformer.ln_f.weight"],
        "language.output_layer.weight": state["lm_head.weight"],
        "connector.proj.weight": state["transformer.visual.proj"].T,
    }
    for i in range(s.layers):
        mine, theirs = f"language.decoder.layers.{i}.", f"transformer.h.{i}."
        for kind in ("weight", "bias"):  # blocks [Q; K; V] to [q, k, v] per head
            blocks = state[f"{theirs}attn.c_attn.{kind}"].unflatten(0, (3, s.heads, -1))
            out[f"{mine}self_attention.linear_qkv.{kind}"] = blocks.transpose(0, 1).flatten(0, 2)
        gate, up = state[theirs + "mlp.w2.weight"], state[theirs + "mlp.w1.weight"]
        out[mine + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
        out[mine + "mlp.linear_fc2.weight"] = state[theirs + "mlp.c_proj.weight"]
        out[mine + "self_attention.linear_proj.weight"] = state[theirs + "attn.c_proj.weight"]
        out[mine + "input_layernorm.weight"] = state[theirs + "ln_1.weight"]
        out[mine + "pre_mlp_layernorm.weight"] = state[theirs + "ln_2.weight"]
    visual = "transformer.visual."
    out["vision.conv1.weight"] = state[visual + "conv1.weight"]
    out["vision.positional_embedding"] = state[visual + "positional_embedding"]
    for kind in ("weight", "bias"):
        out[f"vision.ln_pre.{kind}"] = state[f"{visual}ln_pre.{kind}"]
        for i in range(s.vision_layers):
            mine, theirs = f"vision.transformer.layers.{i}.", f"{visual}transformer.resblocks.{i}."
            for a, b in (
                ("self_attention.linear_qkv", "attn.in_proj"),  # per head on both sides
                ("self_attention.linear_proj", "attn.out_proj"),
                ("mlp.linear_fc1", "mlp.c_fc"),
                ("mlp.linear_fc2", "mlp.c_proj"),
                ("input_layernorm", "ln_1"),
                ("pre_mlp_layernorm", "ln_2"),
            ):
                out[f"{mine}{a}.{kind}"] = state[f"{theirs}{b}.{kind}"]
        for a, b in (("ln_q", "attn_pool.ln_q"), ("ln_kv", "attn_pool.ln_kv"), ("ln_post", "ln_post")):
            out[f"connector.{a}.{kind}"] = state[f"{visual}{b}.{kind}"]
        for name, block in zip("qkv", state[f"{visual}attn_pool.attn.in_proj_{kind}"].chunk(3), strict=True):
            out[f"connector.linear_{name}.{kind}"] = block
        out[f"connector.out_proj.{kind}"] = state[f"{visual}attn_pool.attn.out_proj.{kind}"]
    for name in ("query", "pos_embed", "kv_proj.weight"):
        out[f"connector.{name}"] = state[f"{visual}attn_pool.{name}"]
    return out


def build(state: State, s: Sizes, divisor: int = 8, **language: Any) -> VisionLanguageModel:
    """Build our model with a checkpoint's weights; rows that pad the vocabulary get what must not matter.

    ``language`` is further keys of that branch.
    """
    recipe = tiny_recipe(
        model={
            "preset": "tiny",
            "vision": {"image_size": s.image, "patch_size": s.patch, "hidden_size": s.width}
            | {"num_layers": s.vision_layers, "num_attention_heads": s.vision_heads}
            | {"ffn_hidden_size": s.vision_ffn, "positional_grid": int(s.rows**0.5)},
            "connector": {"num_queries": s.queries, "head_dim": s.hidden // s.resampler_heads},
            "language": {"hidden_size": s.hidden, "ffn_hidden_size": s.ffn, "num_layers": s.layers}
            | {"num_attention_heads": s.heads, "num_query_groups": s.heads, "kv_channels": s.hidden // s.heads}
            | {"vocab_size": s.vocab, "vocab_divisor": divisor, **language},
        }
    )
    model = unwrap(build_model(recipe, s.image_token)[0])
    weights = ours_from(state, s)
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(weights)
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = weights[name]
            if name.startswith(("language.embedding", "language.output_layer")):
                parameter[s.vocab :] = 9.0
                parameter[: s.vocab] = value
                continue
            assert value.shape == parameter.shape, name
            parameter.copy_(value)
    return model.eval()


def batch_of(ids: list[Tensor], labels: list[Tensor], pixels: Tensor) -> Batch:
    """Pack samples; ``labels`` are not shifted, as Hugging Face has them."""
    shifted = [torch.cat([one[1:], torch.tensor([IGNORE_INDEX])]) for one in labels]
    lengths = torch.tensor([0, *map(len, ids)])
    pack = Pack(
        tokens=torch.cat(ids).numpy(),
        labels=torch.cat(shifted).numpy(),
        position_ids=torch.cat([torch.arange(len(one)) for one in ids]).numpy(),
        cu_seqlens=lengths.cumsum(0).int().numpy(),
        segment_sources=torch.zeros(len(ids), dtype=torch.int32).numpy(),
        images=[],
        sample_keys=[],
    )
    return make_batch(pack, pixels, torch.device("cpu"))


@torch.no_grad()
def run(model: VisionLanguageModel, batch: Batch, *, with_labels: bool) -> Tensor:
    """Return [S, V] logits, or the [S] loss of each position (zero where there is no label)."""
    out = model(
        tokens=batch.tokens,
        position_ids=batch.position_ids,
        packed_seq_params=batch.packed_seq_params,
        labels=batch.labels.clamp(min=0) if with_labels else None,
        images=batch.images,
    )[0]
    return out * (batch.labels[0] != IGNORE_INDEX) if with_labels else out


def close(got: Tensor, expected: Tensor, tolerance: float = LOGITS) -> None:
    """Within ``tolerance`` of the largest value."""
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def small_samples(s: Sizes) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return ids, labels and pixels of samples with 0, 2 and 1 images."""
    generator = torch.Generator().manual_seed(3)
    ids, labels = [], []
    for length, starts in ((20, []), (40, [0, 15]), (31, [7])):
        one = torch.randint(0, s.image_token, (length,), generator=generator)
        for start in starts:
            one[start : start + s.queries] = s.image_token
        ids.append(one)
        labels.append(torch.where((one != s.image_token) & (torch.arange(length) > 4), one, IGNORE_INDEX))
    return ids, labels, torch.randn(3, 3, s.image, s.image, generator=generator)


@pytest.mark.parametrize("divisor", [8, 64, 256])
def test_our_model_equals_the_plain_reference(divisor: int) -> None:
    """However many rows pad the vocabulary of 120."""
    state = qwen_reference.random_state(SMALL, seed=1)
    model = build(state, SMALL, divisor)
    ids, labels, pixels = small_samples(SMALL)
    features = qwen_reference.encode(state, SMALL, pixels)
    with torch.no_grad():
        close(model.encode_images(pixels).transpose(0, 1), features)  # type: ignore[union-attr]
    per_sample = [
        qwen_reference.logits(state, SMALL, one, features[cut])
        for one, cut in zip(ids, (slice(0, 0), slice(0, 2), slice(2, 3)), strict=True)
    ]
    batch = batch_of(ids, labels, pixels)
    got = run(model, batch, with_labels=False)
    close(got[:, : SMALL.vocab], torch.cat(per_sample))
    assert got.size(1) == -(-SMALL.vocab // divisor) * divisor
    assert got[:, SMALL.vocab :].isneginf().all()
    cut_labels = batch.labels[0].split([len(one) for one in ids])
    expected = [
        F.cross_entropy(out, own, reduction="none", ignore_index=IGNORE_INDEX)
        for out, own in zip(per_sample, cut_labels, strict=True)
    ]
    close(run(model, batch, with_labels=True), torch.cat(expected), LOSS)


def test_uint8_pixels_are_normalised_with_clips_statistics() -> None:
    model = build(qwen_reference.random_state(SMALL, seed=1), SMALL)
    shape = (2, 3, SMALL.image, SMALL.image)
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        close(model.vision(pixels), model.vision((pixels.double() / 255 - mean).div(std).float()), 1e-5)


@needs_shared
def test_the_plain_reference_equals_the_original_code() -> None:
    s, state = shared_sizes(), load_file(SHARED / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in state.items()} == qwen_reference.shapes(s)
    stored = load_file(SHARED / "reference.safetensors")
    for name in ("s0", "s1", "s2"):
        features = qwen_reference.encode(state, s, stored[f"{name}.pixel_values"])
        if features.numel():
            close(features, stored[f"{name}.image_features"])
        out = qwen_reference.logits(state, s, stored[f"{name}.input_ids"][0], features)
        close(out, stored[f"{name}.logits"][0])


@needs_shared
@pytest.mark.parametrize("names", [["s0"], ["s1"], ["s2"], ["s2", "s1", "s0"]], ids="-".join)
def test_our_model_equals_the_original_code(names: list[str]) -> None:
    s, state = shared_sizes(), load_file(SHARED / "model.safetensors")
    stored = load_file(SHARED / "reference.safetensors")
    model = build(state, s)
    ids = [stored[f"{name}.input_ids"][0] for name in names]
    pixels = torch.cat([stored[f"{name}.pixel_values"] for name in names])
    batch = batch_of(ids, [stored[f"{name}.labels"][0] for name in names], pixels)
    if len(pixels):
        expected = torch.cat([stored[f"{n}.image_features"] for n in names if f"{n}.image_features" in stored])
        with torch.no_grad():
            close(model.encode_images(pixels).transpose(0, 1), expected)  # type: ignore[union-attr]
    close(run(model, batch, with_labels=False), torch.cat([stored[f"{name}.logits"][0] for name in names]))
    losses = run(model, batch, with_labels=True).split([len(one) for one in ids])
    for name, got, labels in zip(names, losses, batch.labels[0].split([len(one) for one in ids]), strict=True):
        mean = got.sum() / (labels != IGNORE_INDEX).sum()
        assert float(mean) == pytest.approx(float(stored[f"{name}.loss"]), rel=LOSS)
