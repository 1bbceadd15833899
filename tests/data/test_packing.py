"""Packs are full, lose nobody, and are laid out as the model expects."""

import random
from itertools import combinations

import numpy as np
import pytest

from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.chat import EncodedSample
from megavlm.data.packing import CarryOverPacker, PackableSample, build_pack, choose_pack


def sample(length: int, key: str = "k", source: int = 0, images: int = 0) -> PackableSample:
    tokens = np.arange(100, 100 + length)
    return PackableSample(EncodedSample(tokens, tokens.copy(), images), (b"i",) * images, key, source)


def best_sum(lengths: list[int], capacity: int) -> int:
    sums = {lengths[0]}
    for length in lengths[1:]:
        sums |= {s + length for s in sums if s + length <= capacity}
    return max(sums)


def test_choice_is_the_best_sum_with_the_oldest() -> None:
    rng = random.Random(0)
    for _ in range(300):
        capacity = rng.randrange(5, 60)
        lengths = [rng.randrange(1, capacity + 1) for _ in range(rng.randrange(1, 12))]
        chosen = choose_pack(lengths, capacity)
        assert chosen[0] == 0 and chosen == sorted(set(chosen))
        assert sum(lengths[i] for i in chosen) == best_sum(lengths, capacity)
    assert choose_pack([], 5) == []


def best_images(lengths: list[int], images: list[int], capacity: int, number: int) -> float:
    """How far the best choice's images are from the wanted number, by trying all choices."""
    wanted = sum(images) * capacity / sum(lengths) + (number * (5**0.5 - 1) / 2) % 1.0 - 0.5
    full = best_sum(lengths, capacity)
    others = range(1, len(lengths))
    choices = [(0, *rest) for size in range(len(lengths)) for rest in combinations(others, size)]
    fitting = [choice for choice in choices if sum(lengths[i] for i in choice) == full]
    return min(abs(sum(images[i] for i in choice) - wanted) for choice in fitting)


def test_balanced_choice_is_as_full_and_nearest_the_average() -> None:
    rng = random.Random(2)
    sizes, exact, far = set(), 0, 0
    for number in range(300):
        capacity = rng.randrange(5, 40)
        lengths = [rng.randrange(1, capacity + 1) for _ in range(rng.randrange(1, 10))]
        images = [rng.randrange(0, 4) for _ in lengths]
        chosen = choose_pack(lengths, capacity, images, number)
        assert chosen[0] == 0 and chosen == sorted(set(chosen))
        assert sum(lengths[i] for i in chosen) == best_sum(lengths, capacity)
        if any(images):
            wanted = sum(images) * capacity / sum(lengths) + (number * (5**0.5 - 1) / 2) % 1.0 - 0.5
            distance = abs(sum(images[i] for i in chosen) - wanted)
            nearest = best_images(lengths, images, capacity, number)
            assert distance < 1 or distance == pytest.approx(nearest)
            exact += distance == pytest.approx(nearest)
            far += nearest >= 1
        else:
            assert chosen == choose_pack(lengths, capacity)
        sizes.add(len(chosen))
    assert len(sizes) > 3 and exact > 200 and far > 30
    assert choose_pack([], 5, []) == []


def mixed(rng: random.Random) -> tuple[int, int]:
    """Tokens and images of a sample: 30 % text, the others one to three images of 258 tokens."""
    images = rng.choices([0, 1, 2, 3], [3, 4, 2, 1])[0]
    return 258 * images + 20 + int(rng.expovariate(1 / 120)), images


@pytest.mark.parametrize("capacity", [2048, 8192])
def test_balanced_packs_differ_less_and_are_as_full(capacity: int) -> None:
    rng = random.Random(3)
    samples = [
        sample(min(n, capacity), str(i), images=images) for i, (n, images) in enumerate(mixed(rng) for _ in range(4000))
    ]
    spread, fill, steps = {}, {}, {}
    for balanced in (False, True):
        packer: CarryOverPacker[PackableSample] = CarryOverPacker(
            capacity, 128, (lambda one: len(one.images)) if balanced else None
        )
        packs = [pack for one in samples if (pack := packer.add(one))]
        images = np.array([sum(len(one.images) for one in pack) for pack in packs])
        spread[balanced] = images.std() / images.mean()
        fill[balanced] = np.mean([sum(map(len, pack)) / capacity for pack in packs])
        whole = len(images) // 8 * 8
        steps[balanced] = images[:whole].reshape(-1, 8).sum(1).std()
        while packer.pool:
            packs.append(packer.pop())
        assert sorted(int(one.key) for pack in packs for one in pack) == list(range(4000))
    assert fill[True] >= 0.995 and fill[True] >= fill[False] - 0.0003, fill
    assert spread[True] < 0.7 * spread[False], spread
    assert steps[True] < 0.8 * steps[False], steps


def test_bad_lengths_are_refused_instead_of_looping() -> None:
    packer: CarryOverPacker[PackableSample] = CarryOverPacker(10, 4)
    for length in (0, 11):
        with pytest.raises(ValueError, match="does not fit"):
            packer.add(sample(length))
        with pytest.raises(ValueError, match="must be from 1 to 10"):
            choose_pack([3, length], 10)
    assert packer.pool == [] and packer.pop() == []


@pytest.mark.parametrize("buffer_size", [64, 256])
def test_padding_is_at_most_one_percent_and_nobody_is_lost(buffer_size: int) -> None:
    rng = random.Random(1)
    capacity = 2048
    lengths = [min(capacity, 258 * rng.choice([0, 1, 1, 2]) + 20 + int(rng.expovariate(1 / 180))) for _ in range(6000)]
    packer: CarryOverPacker[PackableSample] = CarryOverPacker(capacity, buffer_size)
    packs = []
    for i, length in enumerate(lengths):
        pack = packer.add(sample(length, key=str(i)))
        if pack:
            packs.append(pack)
    fill = np.mean([sum(map(len, pack)) / capacity for pack in packs])
    assert fill >= 0.99
    while packer.pool:
        packs.append(packer.pop())
    assert sorted(int(s.key) for pack in packs for s in pack) == list(range(6000))


def test_layout_of_a_pack_with_padding() -> None:
    first, second = sample(3, "a", source=1, images=1), sample(2, "b")
    first.encoded.labels[1] = IGNORE_INDEX
    pack = build_pack([first, second], 8, pad_token=7)
    assert pack.tokens.tolist() == [100, 101, 102, 100, 101, 7, 7, 7]
    x = IGNORE_INDEX
    assert pack.labels.tolist() == [x, 102, x, 101, x, x, x, x]
    assert pack.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert pack.cu_seqlens.tolist() == [0, 3, 5, 8] and pack.cu_seqlens.dtype == np.int32
    assert pack.segment_sources.tolist() == [1, 0, -1]
    assert pack.images == [b"i"] and pack.sample_keys == ["a", "b"]
    assert (pack.padding_tokens, pack.supervised_tokens) == (3, 2)


def test_full_pack_has_no_padding_segment() -> None:
    pack = build_pack([sample(3), sample(2)], 5, pad_token=7)
    assert pack.cu_seqlens.tolist() == [0, 3, 5] and pack.padding_tokens == 0
    with pytest.raises(ValueError, match="do not make a pack"):
        build_pack([sample(3), sample(3)], 5, pad_token=7)
    with pytest.raises(ValueError, match="do not make a pack"):
        build_pack([], 5, pad_token=7)
