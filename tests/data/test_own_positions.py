"""Positions of three numbers, against ``get_rope_index`` of each Transformers class, on random mixes."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_recipe

from megavlm.config.errors import UserError
from megavlm.data.batch import make_pack
from megavlm.data.media import TokenGrid, plan_of
from megavlm.data.positions import OwnPositions, continued, own_grids, positions_of
from megavlm.inference.prompt import Prompt

IMAGE, FILM, MERGE = 900, 901, 2
CLASSES = {
    "qwen2_vl": "Qwen2VLModel",
    "qwen2_5_vl": "Qwen2_5_VLModel",
    "qwen3_vl": "Qwen3VLModel",
    "glm4v": "Glm4vModel",
}
FRAMES_APART = ("qwen3_vl", "glm4v")
OWN = OwnPositions((IMAGE, FILM))
SIDE = dataclasses.replace(OWN, after_film="side")


class Mix:
    """A random sample of texts, pictures and films, as the plan of ``name`` and as Transformers sees it."""

    def __init__(self, name: str, rng: np.random.Generator) -> None:
        tokens: list[np.ndarray] = []
        self.grids: list[TokenGrid] = []
        self.images: list[list[int]] = []
        self.films: list[list[int]] = []
        self.seconds: list[float] = []
        per_second = 2
        for _ in range(int(rng.integers(1, 6))):
            tokens.append(rng.integers(0, IMAGE, int(rng.integers(1, 9))))
            kind = int(rng.integers(0, 3))
            if kind == 0:
                continue
            rows, columns = (int(n) for n in rng.integers(1, 6, 2))
            if kind == 1:
                self.images.append([1, rows * MERGE, columns * MERGE])
                self.grids.append(TokenGrid(1, rows, columns))
                tokens.append(np.full(rows * columns, IMAGE))
                continue
            frames, seconds = int(rng.integers(1, 5)), float(rng.choice([0.5, 1.0, 1.3, 2 / 3, 0.08]))
            self.films.append([frames, rows * MERGE, columns * MERGE])
            self.seconds.append(seconds)
            if name in FRAMES_APART:
                for _ in range(frames):
                    tokens += [rng.integers(0, IMAGE, 3), np.full(rows * columns, FILM)]
                    self.grids.append(TokenGrid(1, rows, columns))
            else:
                step = per_second * seconds if name == "qwen2_5_vl" else 1.0
                self.grids.append(TokenGrid(frames, rows, columns, step))
                tokens.append(np.full(frames * rows * columns, FILM))
        tokens.append(rng.integers(0, IMAGE, int(rng.integers(0, 5))))
        self.tokens = np.concatenate(tokens).astype(np.int64)


def theirs(name: str, mix: Mix) -> tuple[np.ndarray, int]:
    """Return positions [3, L], and how many more than L the next token's is."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    found = getattr(module, CLASSES[name])
    vision = SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=2)
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = found.get_vision_position_ids.__get__(model)
    kinds = torch.from_numpy((mix.tokens == IMAGE) + 2 * (mix.tokens == FILM))[None]
    more = {"second_per_grid_ts": torch.tensor(mix.seconds)} if name == "qwen2_5_vl" else {}
    positions, delta = found.get_rope_index(
        model, torch.from_numpy(mix.tokens)[None], kinds,
        image_grid_thw=torch.tensor(mix.images, dtype=torch.int64).view(-1, 3),
        video_grid_thw=torch.tensor(mix.films, dtype=torch.int64).view(-1, 3), **more,
    )  # fmt: skip
    return positions[:, 0].numpy(), int(delta)


@pytest.mark.parametrize("name", CLASSES)
def test_positions_are_theirs(name: str) -> None:
    rng = np.random.default_rng(3)
    longer = 0
    for _ in range(150):
        mix = Mix(name, rng)
        expected, delta = theirs(name, mix)
        got = SIDE.of(mix.tokens, mix.grids)
        assert np.array_equal(got, expected)
        assert continued(got, 1)[:, -1].tolist() == [len(mix.tokens) + delta] * 3
        # What Transformers does from 5.3 on differs from the paper's definition behind films longer than wide.
        longer += not np.array_equal(OWN.of(mix.tokens, mix.grids), expected)
    assert (longer > 0) is (name not in FRAMES_APART)


def test_behind_a_film_text_goes_on_after_its_largest_number() -> None:
    """As section 2.1 of the paper has it: three frames, two positions apart, of one row and two columns."""
    tokens = [5, *[FILM] * 6, 6, 7]
    got = OWN.of(tokens, [TokenGrid(3, 1, 2, step=2.0)])
    assert got.tolist() == [[0, 1, 1, 3, 3, 5, 5, 6, 7], [0, 1, 1, 1, 1, 1, 1, 6, 7], [0, 1, 2, 1, 2, 1, 2, 6, 7]]


def test_a_sample_may_end_anywhere() -> None:
    rng = np.random.default_rng(4)
    for name in CLASSES:
        mix = Mix(name, rng)
        whole = OWN.of(mix.tokens, mix.grids)
        for end in range(len(mix.tokens)):
            assert np.array_equal(OWN.of(mix.tokens[:end], mix.grids), whole[:, :end])


def test_pictures_without_text_between_them() -> None:
    got = OWN.of([IMAGE] * 5, [TokenGrid(1, 1, 2), TokenGrid(1, 3, 1)])
    assert got.tolist() == [[0, 0, 2, 2, 2], [0, 0, 2, 3, 4], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize("grids", [[], [TokenGrid(1, 1, 2)], [TokenGrid(1, 2, 2)], [TokenGrid(1, 1, 3)] * 2])
def test_grids_that_do_not_match_slots(grids: list[TokenGrid]) -> None:
    with pytest.raises(ValueError, match="slots"):
        OWN.of([1, IMAGE, IMAGE, IMAGE, 2, IMAGE, 3], grids)


def test_a_pack_has_each_samples_own() -> None:
    rng = np.random.default_rng(5)
    mixes = [Mix("qwen2_5_vl", rng) for _ in range(4)]
    length = sum(len(mix.tokens) for mix in mixes) + 7
    pack = make_pack(
        [mix.tokens for mix in mixes], length, positions=OWN, grids=[mix.grids for mix in mixes], pad_token=3
    )
    for (start, end), mix in zip(itertools.pairwise(pack.cu_seqlens), mixes, strict=False):
        assert np.array_equal(pack.position_ids[:, start:end], OWN.of(mix.tokens, mix.grids))
    assert pack.position_ids[:, -7:].tolist() == [list(range(7))] * 3
    assert make_pack([], 5, positions=OWN).position_ids.tolist() == [list(range(5))] * 3


def test_what_a_prompt_is_answered_with_is_text() -> None:
    """Also where the model has generated the token of a slot."""
    prompt = Prompt(np.array([1, IMAGE, IMAGE]), grids=(TokenGrid(1, 1, 2),), answer=[IMAGE, 4])
    assert prompt.positions(OWN)[0].tolist() == [0, 1, 1, 3, 4]
    assert prompt.positions(OWN, 0).shape == (3, 3)
    assert Prompt(np.zeros(0, np.int64)).positions(OWN, 2).tolist() == [[0, 1]] * 3


def test_who_has_them() -> None:
    plain, own = (tiny_recipe(model=_model(sections)).model for sections in ((), (2, 3, 3)))
    assert positions_of(plain, 7) is None and positions_of(own, 7) == OwnPositions((7,))
    layout = plan_of(own).plan(32, 32)
    assert own_grids(own, [layout]) == (TokenGrid(1, 2, 2),)
    assert own_grids(plain, [layout]) == ()


def _model(sections: tuple[int, ...], **image: Any) -> dict[str, Any]:
    recipe = tiny_recipe()
    vision = {"image_size": 32, "positional_grid": 2}
    language = {"kv_channels": 16, "rotary_sections": sections}
    connector = {"num_queries": recipe.model.connector.num_queries, "head_dim": 32}
    return {"preset": "tiny", "vision": vision, "connector": connector, "language": language, "image": image}


def test_a_picture_that_is_no_grid_is_refused() -> None:
    model = tiny_recipe(model=_model((2, 3, 3), kind="anyres") | {"connector": {"preset": "linear"}}).model
    with pytest.raises(UserError, match="no grid of rows and columns"):
        own_grids(model, [plan_of(model).plan(40, 90)])
