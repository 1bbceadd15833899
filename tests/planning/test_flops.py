"""The operations counted for MFU equal those that torch counts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from samples import build, losses, pack, recipe, sample
from saved_tensors import saved_tensors
from tiny import IMAGE_TOKEN, tiny_recipe
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.architectures.cost import Kernels, attended_squares
from megavlm.architectures.decoders.decoder import cost
from megavlm.config.architecture import LANGUAGE
from megavlm.config.schema import ParallelConfig
from megavlm.families.presets import load_presets
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups
from megavlm.planning.flops import (
    count_step,
    image_flops,
    language_flops,
    recomputed_flops,
    step_flops,
)

LENGTHS, IMAGES = (23, 30, 17), 3


@contextlib.contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Count a forward pass; attention as plain matrix products, since torch does not count its fused form on CPUs."""
    with (
        process_groups(ParallelConfig(), seed=1),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        yield counter


def resized(rows: int, patches: int, width: int) -> int:
    """Operations of fitting a table of ``rows`` positions to a picture's grid, once for all pictures; not counted."""
    return 2 * rows * patches * width * int(rows != patches)


@pytest.mark.parametrize("connector", ["resampler", "linear", "mlp2x_gelu"])
@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_tower_and_connector(connector: str, layers: tuple[int, ...] | None) -> None:
    """Features of two layers make the connector's input twice as wide."""
    model: dict[str, Any] = {"preset": "tiny", "connector": {"preset": connector}}
    model["vision"] = {"num_layers": 3, "feature_layers": layers}
    if connector == "resampler":
        model["connector"] |= {"num_queries": 4, "head_dim": 16}
    own = tiny_recipe(model=model)
    side = own.model.vision.image_size
    with counted() as counter:
        built = unwrap(build_model(own, IMAGE_TOKEN)[0])
        built.encode_images(torch.zeros(IMAGES, 3, side, side, dtype=torch.uint8))
    vision, hidden = own.model.vision, own.model.language.hidden_size
    once = resized(vision.positional_grid**2, vision.patches_per_image, vision.hidden_size)
    if connector == "resampler":  # and the queries' projection
        once += 2 * 4 * hidden**2 + resized(4, vision.patches_per_image, hidden)
    expected = counter.get_total_flops() - once
    assert image_flops(own.model, "vision", IMAGES) + image_flops(own.model, "connector", IMAGES) == expected


@pytest.mark.parametrize("vision", [{"class_token": True}, {"post_layernorm": True, "image_size": 30}])
def test_other_towers(vision: dict[str, Any]) -> None:
    """A class token is one position more; pixels beyond the last whole patch cost nothing."""
    own = recipe(vision=vision, modules={"vision": {"freeze": True}})
    side = own.model.vision.image_size
    with counted() as counter:
        tower = unwrap(build_model(own, IMAGE_TOKEN)[0]).vision
        tower(torch.zeros(IMAGES, 3, side, side, dtype=torch.uint8))
    shape = own.model.vision
    once = resized(shape.positional_grid**2, shape.patches_per_image, shape.hidden_size)
    assert image_flops(own.model, "vision", IMAGES) + once == counter.get_total_flops()


@pytest.mark.parametrize("language", [{}, {"num_query_groups": 2, "qk_layernorm": True, "tie_word_embeddings": True}])
def test_language_model(language: dict[str, Any]) -> None:
    own = recipe(language=language)
    with counted() as counter:
        losses(build(language=language), pack([sample(i, length) for i, length in enumerate(LENGTHS)]))
    language = own.model.language
    tokens, squares = sum(LENGTHS), sum(length**2 for length in LENGTHS)
    # torch counts the whole square of attention, megavlm its causal half; and padded rows of the vocabulary.
    upper_half = language.num_layers * 2 * language.num_attention_heads * language.kv_channels * squares
    padded = -(-language.vocab_size // language.vocab_divisor) * language.vocab_divisor
    rows = 2 * tokens * language.hidden_size * (padded - language.vocab_size)
    assert language_flops(language, tokens, squares) + upper_half + rows == counter.get_total_flops()


TINY: dict[str, Any] = {
    "hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 16, "vocab_size": 509, "output_vocab_size": None, "max_position_embeddings": 2048,
    "intermediate_size": 128, "time_step_rank": 5,
}  # fmt: skip
TINY_EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 40, "moe_shared_expert_intermediate_size": 48,
    "moe_layer_freq": (0, 1),
}  # fmt: skip
TINY_LATENT: dict[str, Any] = {"num_query_groups": 4, "rotary_percent": 0.5, "kv_lora_rank": 24, "v_head_dim": 16}
WORK = (
    "gated_linear_unit",
    "use_parallel_residual",
    "visual_expert",
    "cross_hidden_size",
    "qk_layernorm",
    "lm_head_bias",
)
WORK += ("sliding_window", "sliding_window_pattern", "post_layernorms", "head_layernorm", "kv_lora_rank", *TINY_EXPERTS)


def kinds() -> dict[str, dict[str, Any]]:
    """Return, of all registered language models, one preset of each that differs in what it computes, with tiny sizes.

    Layers that attend to pictures instead of text are left out: tests/families/test_whole.py counts them with pictures.
    """
    load_presets()
    found: dict[tuple[object, ...], tuple[str, dict[str, Any]]] = {}
    for name in LANGUAGE.names():
        preset = LANGUAGE.find(name)
        own, keys = preset.values, preset.architecture.config.__pydantic_fields__  # type: ignore[attr-defined]
        if own.get("cross_attention_layers") or preset.architecture.cost is None:  # the planner refuses these
            continue
        small = {key: value for key, value in TINY.items() if key in keys}
        if own.get("num_moe_experts"):
            small |= {key: value for key, value in TINY_EXPERTS.items() if key in own or key == "moe_ffn_hidden_size"}
        if own.get("kv_lora_rank"):
            small |= TINY_LATENT
        computes = (preset.architecture.name, *(repr({**own, **small}.get(key)) for key in WORK))
        found.setdefault(computes, (name, {"preset": name, **small}))
    return dict(found.values())


KINDS = kinds()


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_language_model(name: str) -> None:
    """Experts, experts for pictures, Mamba and all others: to the operation."""
    model = {"preset": "tiny", "vision": {"image_size": 32, "positional_grid": 2}, "connector": {"num_queries": 4}}
    own = tiny_recipe(model={**model, "language": KINDS[name]})
    language, tokens, squares = own.model.language, sum(LENGTHS), sum(length**2 for length in LENGTHS)
    with counted() as counter:
        built = unwrap(build_model(own, IMAGE_TOKEN)[0])
        losses(built, pack([sample(i, length) for i, length in enumerate(LENGTHS)]))
    dense = language_flops(language, tokens, 0)
    attention = language_flops(language, tokens, squares) - dense  # the causal half of what torch counts
    rows = -(-language.output_rows // 128) * 128 - language.output_rows
    assert dense + 2 * attention + 2 * tokens * language.hidden_size * rows == counter.get_total_flops()
    assert (attention > 0) == (LANGUAGE.find(name).architecture.name == "decoder")


@pytest.mark.parametrize("every", [None, 3])
def test_attention_in_windows(every: int | None) -> None:
    """Pairs of a query and a key within a window, counted one by one, less half of each query's pair with itself."""
    window, length, samples = 24, 64, 3
    own = recipe(language={"num_layers": 4, "sliding_window": window, "sliding_window_pattern": every})
    language, squares = own.model.language, samples * length**2
    narrow, whole = (sum(min(i + 1, w) for i in range(length)) - w / 2 for w in (window, length))
    layers = 1 if every else 0  # without a window
    pairs = samples * (layers * whole + (4 - layers) * narrow)
    found = count_step(
        own, tokens=samples * length, squared_lengths=squares, positions=samples * length, squared_positions=squares,
        images=0,
    )  # fmt: skip
    dense = 3 * language_flops(language, samples * length, 0)
    assert found.useful - dense == 3 * 4 * language.num_attention_heads * language.kv_channels * pairs
    assert found.conventional - dense == 2 * (found.useful - dense)
    # Segments that fit in the window are as ever.
    assert attended_squares(language, 3 * window, 3 * window**2) == 3 * window**2


def test_masks_of_windows_are_kept() -> None:
    kept = {}
    for window in (None, 16):
        with process_groups(ParallelConfig(), seed=1):
            model = build(language={"sliding_window": window})
            with saved_tensors(model.parameters()) as saved:
                losses(model, pack([sample(0, 64)]))
        language = recipe(language={"sliding_window": window}).model.language
        plain = Kernels(fused=False, number_bytes=4)
        layer = cost.layer_kept(language, Layout(), 64, plain, learns=True)
        kept[window] = saved.bytes, language.num_layers * layer
        assert layer - cost.attention_kept(language, Layout(), 64, plain, learns=True) > 0
    (real, planned), (real_in_window, planned_in_window) = kept.values()
    assert planned_in_window - planned == pytest.approx(real_in_window - real, rel=0.02)


class Layout(NamedTuple):
    """One process."""

    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1


LORA = {"rank": 4, "targets": ("c_attn", "attn.c_proj", "w1", "w2")}


@pytest.mark.parametrize("head", [False, True])
def test_a_step_of_adapters(head: bool) -> None:
    """Forward and backward, counted: frozen weights have gradients of their inputs alone, adapters of both."""
    frozen = {"vision": {"freeze": True}, "connector": {"freeze": True}}
    own = recipe(modules=frozen, lora={**LORA, "train_head": head})
    language, tokens, squares = own.model.language, sum(LENGTHS), sum(length**2 for length in LENGTHS)
    packed = pack([sample(i, length) for i, length in enumerate(LENGTHS)])
    with counted() as counter, torch.enable_grad():
        losses(build(modules=frozen, lora={**LORA, "train_head": head}), packed).sum().backward()
    upper_half = language.num_layers * 2 * language.num_attention_heads * language.kv_channels * squares
    padded = -(-language.vocab_size // language.vocab_divisor) * language.vocab_divisor
    rows = 2 * tokens * language.hidden_size * (padded - language.vocab_size)
    expected = step_flops(own, tokens=tokens, squared_lengths=squares, images=0) + 3 * upper_half + (2 + head) * rows
    assert expected == counter.get_total_flops()


def test_frozen_modules_cost_less() -> None:
    def total(**modules: dict[str, bool]) -> int:
        return step_flops(recipe(modules=modules), tokens=100, squared_lengths=2000, images=2)

    own = recipe()
    vision, connector = image_flops(own.model, "vision", 2), image_flops(own.model, "connector", 2)
    language = language_flops(own.model.language, 100, 2000)
    frozen = {"freeze": True}
    assert total() == 3 * (vision + connector + language)
    assert total(vision=frozen) == vision + 3 * (connector + language)
    assert total(vision=frozen, language=frozen) == vision + 3 * connector + 2 * language
    assert total(vision=frozen, connector=frozen) == vision + connector + 3 * language
    assert total(language=frozen, connector=frozen) == 3 * vision + 2 * connector + 2 * language


FREEZE = {"vision": {"freeze": True}, "connector": {"freeze": True}}
AGAIN: dict[str, dict[str, Any]] = {
    "selective": {"parallel": {"recompute_granularity": "selective"}},
    "full": {"parallel": {"recompute_granularity": "full"}},
    "full-two-at-once": {"parallel": {"recompute_granularity": "full", "recompute_num_layers": 2}},
    "full-with-adapters": {"parallel": {"recompute_granularity": "full"}, "modules": FREEZE, "lora": LORA},
    "full-below-which-one-learns": {
        "parallel": {"recompute_granularity": "full"},
        "modules": {"language": {"freeze": True}},
    },
    "tower": {"vision": {"gradient_checkpointing": True}},
    "frozen-tower": {"vision": {"gradient_checkpointing": True}, "modules": FREEZE},
}
PADDING = 26


@pytest.mark.parametrize("name", AGAIN)
def test_what_is_computed_twice(name: str) -> None:
    """A step with recomputation has just those operations more than one without, padding and whole squares included."""
    case = AGAIN[name]
    packed = pack([sample(i, length, images) for i, (length, images) in enumerate(((23, 1), (47, 2)))], PADDING)
    plain = {key: value for key, value in case.items() if key not in ("parallel", "vision")}
    found = []
    for branches in (case, plain):
        with counted() as counter, torch.enable_grad():
            losses(build(**branches), packed).sum().backward()
        found.append(counter.get_total_flops())
    squares = 2 * (23**2 + 47**2 + PADDING**2)
    expected = recomputed_flops(recipe(**case), 23 + 47 + PADDING, squares, 3)
    assert found[0] - found[1] == expected
    assert (expected > 0) == (name != "frozen-tower")


def test_three_ways_of_counting() -> None:
    """Padding and the masked half are work by convention, and what is made again is the hardware's alone."""
    own = recipe(parallel={"recompute_granularity": "full"})
    counts = {"tokens": 70, "squared_lengths": 2738, "positions": 96, "squared_positions": 3414, "images": 3}
    flops = count_step(own, **counts)
    assert flops.useful == step_flops(own, 70, 2738, 3)
    assert flops.conventional == step_flops(own, 96, 2 * 3414, 3)
    language = own.model.language
    output = 2 * 96 * language.hidden_size * language.vocab_size
    assert flops.hardware - flops.conventional == language_flops(language, 96, 2 * 3414) - output
    # Images cost what the tower makes of their patches, whatever the text beside them.
    without = count_step(own, **{**counts, "images": 0})
    images = 3 * (image_flops(own.model, "vision", 3) + image_flops(own.model, "connector", 3))
    for name in ("useful", "conventional", "hardware"):
        assert getattr(flops, name) - getattr(without, name) == images
