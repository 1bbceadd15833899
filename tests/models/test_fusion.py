"""The splice, against plain NumPy; and what a fusion gives the layers beside their input gets there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from samples import build, losses, pack, sample
from tiles_cases import recipe
from torch import Tensor, nn

from megavlm.data.device_batch import arrangement_on
from megavlm.data.media import arrange, plan_of
from megavlm.models.fusion import Extras, Splice, add_newline

SLOT, WIDTH, ROW = 99, 8, 4
PER_VIEW = ROW**2  # features of a view
CPU = torch.device("cpu")
Array = NDArray[np.float32]


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def splice(*, newline: bool = False) -> tuple[Splice, Tensor]:
    """Return a splice and its newline vector, which is there in any case for the reference."""
    connector = nn.Module()
    torch.manual_seed(5)
    add_newline(connector, WIDTH, torch.float32, initialize=True)
    vector = connector.get_parameter("image_newline")
    return Splice(connector if newline else nn.Module(), SLOT), vector


def reference(embeddings_SE: Array, tokens: list[int], features_TE: Array) -> Array:
    """One feature after the other into the slots."""
    rows, left = [], list(features_TE)
    for token, row in zip(tokens, embeddings_SE, strict=True):
        rows.append(left.pop(0) if token == SLOT else row)
    assert not left
    return np.stack(rows)


def fused(
    own: Splice, tokens: list[int], features_TE: Tensor | None, *, stand_in: bool = False
) -> tuple[Array, Tensor]:
    """Return [S, E] of random embeddings by NumPy, and what the splice made of them."""
    embeddings = numbers(1, len(tokens), WIDTH)
    found, extras = own.fuse(
        torch.from_numpy(embeddings)[:, None], features_TE, torch.tensor([tokens]), stand_in=stand_in
    )
    assert extras is None and found.shape == (len(tokens), 1, WIDTH)
    return embeddings, found[:, 0]


def test_text_alone() -> None:
    tokens = [3, 1, 4, 1, 5]
    embeddings, found = fused(splice()[0], tokens, None)
    assert np.array_equal(found, embeddings)
    # Beside the empty picture: the same numbers, and gradients of zeros for all that made it, newline included.
    for newline in (False, True):
        own, vector = splice(newline=newline)
        features = torch.from_numpy(numbers(2, PER_VIEW, 1, WIDTH)).requires_grad_()
        embeddings, found = fused(own, tokens, own.arranged(features, None, None), stand_in=True)
        assert np.array_equal(found.detach(), embeddings)
        found.square().sum().backward()
        assert features.grad is not None and not features.grad.any()
        assert (vector.grad is not None and not vector.grad.any()) == newline


def test_pictures_in_their_order() -> None:
    own, _ = splice()
    features = numbers(2, PER_VIEW, 2, WIDTH)
    first, second = features[:, 0], features[:, 1]
    one = [7, *[SLOT] * PER_VIEW, 8, 9]
    embeddings, found = fused(own, one, own.arranged(torch.from_numpy(features[:, :1]), None, None))
    assert np.array_equal(found, np.concatenate([embeddings[:1], first, embeddings[-2:]]))
    # Two, the second one cut in two by text.
    two = [7, *[SLOT] * (2 * PER_VIEW - 3), 8, *[SLOT] * 3, 9]
    embeddings, found = fused(own, two, own.arranged(torch.from_numpy(features), None, None))
    assert np.array_equal(found, reference(embeddings, two, np.concatenate([first, second])))
    # Features of another number type become the embeddings'.
    _, found = fused(own, one, torch.from_numpy(first).double())
    assert found.dtype == torch.float32 and np.array_equal(found[1:-2], first)


def test_the_slots_are_as_many_as_the_features() -> None:
    own, _ = splice()
    for slots in (3, 5):
        with pytest.raises(RuntimeError, match="there are not 4 image slots"):
            fused(own, [SLOT] * slots, torch.from_numpy(numbers(2, 4, WIDTH)))


def test_tiles_with_newlines() -> None:
    """LLaVA-1.6: the whole picture, then the rows that the tiles make together, a newline behind each."""
    pinpoints = ((32, 64), (64, 32), (64, 64))
    plan = plan_of(recipe({"kind": "anyres", "pinpoints": pinpoints}).model)
    assert (plan.side, plan.tokens_per_view) == (32, PER_VIEW)
    own, vector = splice(newline=True)
    newline = vector.detach().numpy()
    wide, tall = plan.plan(64, 32), plan.plan(32, 64)  # two tiles each, beside and above each other; no padding
    index, weight = arrangement_on(arrange(plan, [wide, tall]), CPU)
    features = numbers(3, PER_VIEW, 6, WIDTH)
    (whole, left, right), (other, above, below) = features.transpose(1, 0, 2)[:3], features.transpose(1, 0, 2)[3:]
    rows = [whole]
    each_row = [slice(at, at + ROW) for at in range(0, PER_VIEW, ROW)]
    for row in each_row:
        rows += [left[row], right[row], newline[None]]
    rows.append(other)
    for tile in (above, below):
        for row in each_row:
            rows += [tile[row], newline[None]]
    expected = np.concatenate(rows)
    assert len(expected) == wide.tokens + tall.tokens
    tokens = [7, *[SLOT] * wide.tokens, 8, 9, *[SLOT] * tall.tokens, 1]
    embeddings, found = fused(own, tokens, own.arranged(torch.from_numpy(features), index, weight))
    assert np.array_equal(found.detach(), reference(embeddings, tokens, expected))
    found.sum().backward()
    assert vector.grad is not None and vector.grad.tolist() == [3.0 * ROW] * WIDTH  # as many rows have one


def test_slots_of_several_features() -> None:
    """Interpolated features, as LLaVA-OneVision has above its limit: a weighted mean for each slot, or a newline."""
    own, vector = splice(newline=True)
    features, weight = numbers(3, PER_VIEW, 3, WIDTH), np.abs(numbers(4, 5, 2))
    index = np.array([[0, 45], [4, 5], [-1, 0], [17, 2], [3, 3]])
    by_view = features.transpose(1, 0, 2).reshape(-1, WIDTH)
    expected = np.stack(
        [
            vector.detach().numpy() if row[0] < 0 else sum(w * by_view[i] for w, i in zip(each, row, strict=True))
            for row, each in zip(index, weight, strict=True)
        ]
    )
    found = own.arranged(torch.from_numpy(features), torch.from_numpy(index), torch.from_numpy(weight))
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-6, atol=1e-6)


def test_extras_reach_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = build(), []
    model.language.decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    batch = pack([sample(1, 17, 1)])
    plain = losses(model, batch)
    assert "context" not in seen.pop()

    class Crossing(Splice):
        def fuse(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Extras]:
            return super().fuse(*args, **kwargs)[0], {"context": args[1]}

    monkeypatch.setattr(model.fusion, "__class__", Crossing)
    assert torch.equal(losses(model, batch), plain)  # layers without cross-attention do not look at it
    assert seen[0]["context"].shape == model.arranged(model.encode_images(batch.images)).shape
