"""The whole model: packing, positions, image slots, frozen parts and micro-batches without images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import Sample, build, gradients, losses, pack, recipe, sample
from tiny import IMAGE_SIZE, IMAGE_TOKEN, TOKENS_PER_IMAGE
from torch import Tensor

from megavlm.data.device_batch import Batch
from megavlm.models.vlm import VisionLanguageModel
from megavlm.training.build import build_training
from megavlm.training.step import train_step

FP32 = 1e-5

# None, one, two and three images; the last sample is nothing but an image.
SAMPLES = [sample(0, 23), sample(1, 17, 1), sample(2, 30, 3), sample(3, 21, 2), sample(4, TOKENS_PER_IMAGE, 1)]


def close(got: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest value."""
    torch.testing.assert_close(got, expected, rtol=0, atol=FP32 * max(1.0, float(expected.detach().abs().max())))


def parts(batch: Batch, values: Tensor) -> list[Tensor]:
    """Cut [S, ...] values at the segment borders."""
    return list(values.split(batch.packed_seq_params.cu_seqlens_q.diff().tolist()))


@pytest.mark.parametrize("padding", [0, 11])
def test_a_pack_equals_its_samples_one_by_one(padding: int) -> None:
    model = build()
    batch = pack(SAMPLES, padding)
    for got, one in zip(parts(batch, losses(model, batch)), SAMPLES, strict=False):
        close(got, losses(model, pack([one])))
    got_gradients = gradients(model, batch)
    sums: dict[str, Tensor] = {}
    for one in SAMPLES:
        for name, gradient in gradients(model, pack([one])).items():
            if gradient is not None:
                sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(sums) == {name for name, g in got_gradients.items() if g is not None}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"connector.pos_embed"}
    for name, expected in sums.items():
        assert expected.abs().max() > 0, name
        got_gradient = got_gradients[name]
        assert got_gradient is not None
        close(got_gradient, expected)


def capture_attention(model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return [S, heads, D] query and key as the first layer's core attention gets them, and its [S, 3E] raw QKV."""
    seen: dict[str, Any] = {}
    attention = model.language.decoder.layers[0].self_attention
    hooks = [
        attention.core_attention.register_forward_pre_hook(lambda _, args: seen.update(q=args[0], k=args[1])),
        attention.linear_qkv.register_forward_hook(lambda _, args, out: seen.update(raw=out[0])),
    ]
    losses(model, batch)
    for hook in hooks:
        hook.remove()
    return seen["q"], seen["k"], seen["raw"][:, 0]


def rotate(x_SND: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Return rotary positions in rotate-half form, from the paper's formula (arXiv 2104.09864)."""
    half = x_SND.size(-1) // 2
    angles = positions[:, None] * base ** -(torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x_SND[..., :half], x_SND[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@pytest.mark.parametrize("chosen", [[0, 1, 2], [2], [0, 1]], ids=["three", "one fills the pack", "two"])
@pytest.mark.parametrize("padding", [0, 9, 40])
def test_rotary_positions_start_again_in_each_segment(chosen: list[int], padding: int) -> None:
    model = build()
    batch = pack([SAMPLES[i] for i in chosen], padding)
    query, key, raw = capture_attention(model, batch)
    positions = torch.cat([torch.arange(len(p)) for p in parts(batch, raw)])
    assert torch.equal(batch.position_ids[0], positions)
    raw_S_heads_qkv_D = raw.unflatten(-1, (4, 3, 16))
    close(query, rotate(raw_S_heads_qkv_D[:, :, 0], positions))
    close(key, rotate(raw_S_heads_qkv_D[:, :, 1], positions))


def test_a_sample_is_the_same_anywhere_in_the_pack() -> None:
    model = build()
    first, second = pack(SAMPLES), pack([*SAMPLES[2:], *SAMPLES[:2]], 5)
    one, other = parts(first, losses(model, first)), parts(second, losses(model, second))
    for got, expected in zip([*other[3:5], *other[:3]], one, strict=True):
        close(got, expected)


def test_samples_do_not_see_each_other() -> None:
    model = build()
    before = pack(SAMPLES, 8)
    changed = Sample((SAMPLES[1].tokens + 1) % IMAGE_TOKEN, SAMPLES[1].labels, SAMPLES[1].pixels)
    changed.tokens[:TOKENS_PER_IMAGE] = IMAGE_TOKEN
    after = pack([SAMPLES[0], changed, *SAMPLES[2:]], 8)
    old, new = parts(before, losses(model, before)), parts(after, losses(model, after))
    assert (old[1] - new[1]).abs().max() > 1e-2
    for i in (0, 2, 3, 4):
        torch.testing.assert_close(new[i], old[i], rtol=0, atol=1e-6)


def test_a_later_token_does_not_change_an_earlier_loss() -> None:
    model = build()
    one = sample(9, 20, 1)
    later = Sample(one.tokens.copy(), one.labels, one.pixels)
    later.tokens[12] = (one.tokens[12] + 1) % IMAGE_TOKEN
    old, new = losses(model, pack([one])), losses(model, pack([later]))
    torch.testing.assert_close(new[:12], old[:12], rtol=0, atol=1e-6)
    assert (new[12:] - old[12:]).abs().max() > 1e-3


def spliced(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """Return the [S, E] embeddings that the language model gets."""
    seen: dict[str, Any] = {}
    hook = model.language.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    losses(model, batch)
    hook.remove()
    return seen["decoder_input"][:, 0]


def test_image_features_fill_their_slots_in_order() -> None:
    model = build()
    batch = pack(SAMPLES, 6)
    got = spliced(model, batch)
    slots = batch.tokens[0] == IMAGE_TOKEN
    assert batch.images is not None
    assert int(slots.sum()) == batch.images.size(0) * TOKENS_PER_IMAGE
    one_by_one = torch.cat([model.connector(model.vision(image[None]))[:, 0] for image in batch.images])
    close(got[slots], one_by_one)
    close(got[~slots], model.language.embedding.word_embeddings.weight[batch.tokens[0][~slots]])
    flipped = Batch(**{**vars(batch), "images": batch.images.flip(0)})
    close(spliced(model, flipped)[slots], one_by_one.unflatten(0, (-1, TOKENS_PER_IMAGE)).flip(0).flatten(0, 1))


def test_swapped_images_swap_the_outcome() -> None:
    model = build()
    one = sample(11, 25, 1)
    other = Sample(one.tokens, one.labels, sample(12, 25, 1).pixels)
    batch, swapped = pack([one, other]), pack([other, one])
    a, b = parts(batch, losses(model, batch))
    c, d = parts(swapped, losses(model, swapped))
    assert (a - b).abs().max() > 1e-3, "the images make no difference"
    close(c, b)
    close(d, a)
    two = sample(13, 24, 2)
    reversed_ = Sample(two.tokens, two.labels, two.pixels[::-1].copy())
    assert (losses(model, pack([two])) - losses(model, pack([reversed_]))).abs().max() > 1e-3


def test_features_may_be_given_instead_of_images() -> None:
    model = build()
    batch = pack(SAMPLES)
    args = {"tokens": batch.tokens, "position_ids": batch.position_ids, "packed_seq_params": batch.packed_seq_params}
    features = model.encode_images(batch.images)
    assert features is not None
    close(model(**args, image_features=model.arranged(features)), model(**args, images=batch.images))


def test_slots_and_images_must_match() -> None:
    batch = pack([sample(5, 20, 2)])
    assert batch.images is not None
    short = Batch(**{**vars(batch), "images": batch.images[:1]})
    with pytest.raises(RuntimeError, match="not 4 image slots"):
        losses(build(), short)


def test_without_images_the_gradients_of_tower_and_connector_are_zero_and_not_missing() -> None:
    model = build()
    text = pack([sample(6, 20), sample(7, 31)])
    got = gradients(model, text)
    for name, gradient in got.items():
        if name == "connector.pos_embed":
            assert gradient is None
            continue
        assert gradient is not None, name
        if name.startswith("language."):
            assert gradient.abs().max() > 0, name
        else:
            assert gradient.abs().max() == 0, name
    frozen = build(modules={"vision": {"freeze": True}, "connector": {"freeze": True}})
    for name, gradient in gradients(frozen, text).items():
        if name.startswith("language."):
            assert gradient is not None
            assert torch.equal(gradient, got[name]), "the empty picture changes the language model"


def test_the_empty_picture_is_for_training_alone() -> None:
    model = build()
    none = torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    assert model.encode_images(none) is not None
    with torch.no_grad():
        assert model.encode_images(none) is None
        assert model.encode_images(None) is None
    frozen = build(modules={"vision": {"freeze": True}, "connector": {"freeze": True}})
    assert frozen.encode_images(none) is None


def test_a_frozen_tower_keeps_no_graph() -> None:
    images = pack(SAMPLES).images
    for freeze in (False, True):
        model = build(modules={"vision": {"freeze": freeze}})
        seen: list[bool] = []

        def look(_: Any, args: Any, out: Tensor, seen: list[bool] = seen) -> None:
            seen.extend([out.requires_grad, torch.is_grad_enabled()])

        model.vision.register_forward_hook(look)
        features = model.encode_images(images)
        assert features is not None
        assert features.requires_grad
        assert seen == [not freeze, not freeze]


def test_a_recomputed_tower_has_the_same_gradients() -> None:
    batch = pack(SAMPLES)
    expected = gradients(build(), batch)
    for name, got in gradients(build(vision={"gradient_checkpointing": True}), batch).items():
        if name == "connector.pos_embed":
            continue
        assert got is not None, name
        close(got, expected[name])


def take_steps(batches: list[Batch], **branches: dict[str, Any]) -> set[str]:
    """Train one step per micro-batch; return the modules whose weights changed."""
    torch.manual_seed(0)
    training = build_training(recipe(training={"train_steps": 10}, **branches), IMAGE_TOKEN)
    (module,) = training.modules
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for batch in batches:
        training.scheduler.step(1)
        train_step(training.chunks, training.optimizer, [batch], num_sources=1)
    return {name.split(".")[0] for name, p in module.named_parameters() if not torch.equal(p, before[name])}


NO_DECAY = {"lr": 1e-2, "weight_decay": 0.0}
TEXT, IMAGES = pack([sample(6, 20), sample(7, 31)]), pack(SAMPLES)


def test_text_alone_leaves_tower_and_connector_as_they_are() -> None:
    """Without weight decay: zero gradients and zero moments are no update at all."""
    assert take_steps([TEXT] * 3, optimizer=NO_DECAY) == {"language"}
    assert take_steps([IMAGES], optimizer=NO_DECAY) == {"vision", "connector", "language"}


@pytest.mark.parametrize("batches", [[IMAGES, TEXT], [TEXT, IMAGES]], ids=["images first", "text first"])
@pytest.mark.parametrize(
    "frozen",
    [("vision",), ("connector",), ("language",), ("vision", "connector"), ("vision", "language")],
    ids="-".join,
)
def test_frozen_modules_get_no_gradient_and_stay(frozen: tuple[str, ...], batches: list[Batch]) -> None:
    modules = {name: {"freeze": True} for name in frozen}
    # Weight decay must not touch them either.
    changed = take_steps(batches, modules=modules, optimizer={"lr": 1e-2, "weight_decay": 0.5})
    assert changed == {"vision", "connector", "language"} - set(frozen)
    for name, gradient in gradients(build(modules=modules), IMAGES).items():
        learns = name.split(".")[0] not in frozen and name != "connector.pos_embed"
        assert (gradient is not None) == learns, name
