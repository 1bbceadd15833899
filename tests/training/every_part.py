"""Every registered part in a small model, with packs of pictures that it takes: for tests that walk them all.

Towers, connectors and language models come from the registries (``test_matrix``), what these do not hold by name: other
plans of pictures, films, masks, experts that are full, adapters, weights in 4 bits.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import cross_cases  # noqa: E402
import levels_cases  # noqa: E402
import numpy as np  # noqa: E402
import placement_cases  # noqa: E402
import tiles_cases  # noqa: E402
import torch  # noqa: E402
from expert_run_cases import ALL, MIXED, recipe_of  # noqa: E402
from megatron.core.transformer.moe import moe_utils, token_dispatcher  # noqa: E402
from test_films import RECIPES as FILM_RECIPES  # noqa: E402
from test_films import SHOWN, sample  # noqa: E402
from test_matrix import branches, chosen, make_model, model_count, packed  # noqa: E402
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe  # noqa: E402

from megavlm.architectures.decoders.decoder import build as decoder_build  # noqa: E402
from megavlm.config.help import to_tree  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.decoders import make_decoder  # noqa: E402
from megavlm.data.device_batch import Batch, share_packs  # noqa: E402
from megavlm.data.media import plan_of  # noqa: E402
from megavlm.data.packing import build_pack  # noqa: E402
from megavlm.data.positions import positions_of  # noqa: E402
from megavlm.data.read_pack import ReadPack, decode_pack  # noqa: E402
from megavlm.data.spans import spans_of  # noqa: E402
from megavlm.layers import experts  # noqa: E402
from megavlm.training.spread import PictureSpread  # noqa: E402

PACKS = 2
CODES = {
    "preset": None,
    "vision": {
        "preset": "chameleon_vq_gan", "image_size": 8, "base_width": 32, "width_multipliers": [1, 1, 2],
        "blocks_per_level": 1, "latent_width": 16, "code_width": 24, "num_codes": 40,
    },
    "connector": {"preset": "codes"},
    "language": {
        "preset": "chameleon_7b", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4,
        "num_query_groups": 4, "kv_channels": 16, "vocab_size": 517, "image_tokens": [120, 160],
    },
    "image": {"kind": "squash"},
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A model, and the micro-batches of a step."""

    recipe: Recipe
    batches: Callable[[int], Sequence[Batch]]
    base: Recipe | None = None
    """Of the weights that it begins with, where it cannot draw its own."""


def _drawn(recipe: Recipe, *, alike: bool = False) -> Part:
    """Return a model with packs as ``placement_cases`` draws them."""

    def batches(step: int) -> list[Batch]:
        packs = placement_cases.read(recipe, step, (), alike=alike)[:PACKS]
        spread = PictureSpread(recipe) if recipe.parallel.vision_placement == "all_ranks" else None
        return share_packs(packs, len(packs), spread)

    return Part(recipe, batches)


def registered_count() -> int:
    """Return how many models hold every registered part."""
    return model_count()


def registered(number: int) -> Part:
    """Return a model of ``test_matrix``."""
    names = chosen(number)
    model, vision = branches(**names), names["vision"]
    several = len(make_model(vision, names["connector"]).vision.sides) > 1
    model["image"] = {"kind": "native" if packed("vision", vision) else "fit_pair" if several else "squash"}
    tower = model["vision"]
    if "positional_grid" in tower:  # a table beside the features has no other size
        tower["positional_grid"] = tower["image_size"] // tower["patch_size"]
    return _drawn(tiny_recipe(model=model), alike=True)


def _tiles(image: dict[str, Any]) -> Part:
    recipe = tiles_cases.recipe(image)
    plan = plan_of(recipe.model)
    return Part(recipe, lambda step: tiles_cases.shared(plan, tiles_cases.packs(plan, PACKS, step)))


def _levels(**model: Any) -> Part:
    recipe = levels_cases.recipe(**model)
    plan, own, spans = (
        plan_of(recipe.model),
        positions_of(recipe.model, IMAGE_TOKEN),
        spans_of(recipe.model, IMAGE_TOKEN),
    )
    return Part(recipe, lambda step: tiles_cases.shared(plan, levels_cases.packs(plan, own, PACKS, step, spans)))


def _films(recipe: Recipe) -> Part:
    """Return a model with packs of films, pictures and text."""
    plan, own = plan_of(recipe.model), positions_of(recipe.model, IMAGE_TOKEN)

    def batches(step: int) -> list[Batch]:
        samples = [sample(recipe, step * 10 + number, shown) for number, shown in enumerate(SHOWN)]
        length = sum(map(len, samples)) + 8
        pack = build_pack(samples, length, 3, plan, own, spans_of(recipe.model, IMAGE_TOKEN))
        read = decode_pack(pack, make_decoder("pil"), plan, IMAGE_TOKEN)
        assert not read.masked
        return share_packs([read], 1, None)

    return Part(recipe, batches)


def _plain(**branches: Any) -> Part:
    return _drawn(tiny_recipe(**branches))


def _native(**branches: Any) -> Part:
    """Return a model whose tower takes pictures of any size, with windows."""
    recipe = FILM_RECIPES["M-RoPE in seconds"]
    model = {name: value for name, value in to_tree(recipe)["model"].items() if name != "video"}
    return _drawn(tiny_recipe(**{"model": model, **branches}))


def _codes() -> Part:
    """Return a model whose pictures are four tokens of a table."""
    recipe = tiny_recipe(model=CODES, modules={"vision": {"freeze": True}})
    shape = recipe.model.vision.pixel_shape

    def batches(step: int) -> list[Batch]:
        made = [ReadPack(pack, torch.from_numpy(np.resize(pixels, (len(pixels), *shape)) if len(pixels) else
                np.zeros((0, *shape), np.uint8))) for pack, pixels in random_packs(PACKS, step)]  # fmt: skip
        return share_packs(made, len(made), None)

    return Part(recipe, batches)


FULL = {"parallel": {"recompute_granularity": "full"}}
LORA = {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}}
MAKERS: dict[str, Callable[[], Part]] = {
    "bf16": lambda: _plain(training={"precision": "bf16"}),
    "plain optimizer": lambda: _plain(parallel={"use_distributed_optimizer": False}),
    "recomputed": lambda: _plain(**FULL),
    "adapters": lambda: _plain(**LORA),
    "frozen tower": lambda: _plain(modules={"vision": {"freeze": True}}),
    "tower on all ranks": lambda: _plain(parallel={"vision_placement": "all_ranks"}),
    "tiles": lambda: _tiles(tiles_cases.ANYRES),
    "most tiles": lambda: _tiles(tiles_cases.ANYRES_MAX),
    "tiles and a thumbnail": lambda: _tiles(tiles_cases.TILES),
    "split tiles": lambda: _tiles(tiles_cases.SPLIT_TILES),
    "films, M-RoPE": lambda: _films(FILM_RECIPES["M-RoPE in seconds"]),
    "films, timestamps": lambda: _films(FILM_RECIPES["timestamps"]),
    "films, squares": lambda: _films(FILM_RECIPES["squares"]),
    "pictures of any size": _native,
    "pictures of any size, recomputed": lambda: _native(**FULL),
    "deepstack": _levels,
    "visual expert": lambda: _levels(levels=(), language=levels_cases.COG),
    "visual expert and a second tower": lambda: _levels(**levels_cases.AGENT),
    "half heads turned": lambda: _levels(levels=(), language=levels_cases.GLM),
    "attention to pictures": lambda: _drawn(cross_cases.recipe()),
    "attention to pictures, adapters": lambda: _drawn(cross_cases.recipe(lora={"rank": 4})),
    "experts, all": lambda: _drawn(recipe_of(ALL)),
    "experts, capacity": lambda: _drawn(recipe_of(MIXED)),
    # Not recomputed: Megatron-Core's router moves a weight that is on a CPU (as all are, that pretend) to the device,
    # and the optimizer goes on with what it left; no weight is there on a real one.
    "experts, adapters": lambda: _drawn(recipe_of(ALL, lora={"rank": 4})),
    "codes": _codes,
}
if importlib.util.find_spec("bitsandbytes") is not None:
    MAKERS["4 bits"] = lambda: replace(
        _plain(lora={"rank": 4, "quantize": "nf4"}, training={"precision": "bf16"}),
        base=tiny_recipe(training={"precision": "bf16"}),
    )


@contextlib.contextmanager
def experts_as_on_a_gpu(patch: Any) -> Iterator[None]:
    """Let experts go the way that they go with CUDA: Megatron-Core's own, not the one for CPUs."""
    with patch.context() as own:
        for name in ("permute", "unpermute", "sort_chunks_by_idxs"):
            own.setattr(token_dispatcher, name, getattr(moe_utils, name))
        own.setattr(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", None)  # kept from test to test
        own.setattr(experts, "has_kernels", lambda: True)
        own.setattr(decoder_build, "has_kernels", lambda: True)
        yield
