"""The reader on real Energon data sets: exact restarts, fair blends, nobody lost, and states that do not fit."""

from __future__ import annotations

import gc
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data_helpers import TOKENS_PER_IMAGE, content, encode_image, open_reader, prepare, smooth_image, take, write_raw
from tokenizer_files import write_llama

from megavlm.config.schema import DataConfig, DataSource
from megavlm.data.decoders import make_decoder
from megavlm.data.plans_single import SquashPlan
from megavlm.data.reader import PackReader
from megavlm.data.tokenizer import Tokenizer, load_tokenizer
from megavlm.quickstart.render import render_dataset

Datasets = tuple[Path, Path]
OpenReader = Callable[..., PackReader]


@pytest.fixture
def opened(tokenizer: Tokenizer) -> Iterator[OpenReader]:
    """Open readers that are closed at the end."""
    readers: list[PackReader] = []

    def run(datasets: object, **options: object) -> PackReader:
        readers.append(open_reader(datasets, tokenizer, **options))
        return readers[-1]

    yield run
    for reader in readers:
        reader.close()


def through_json(state: object) -> object:
    return json.loads(json.dumps(state))


@pytest.mark.parametrize(
    ("num_workers", "packing", "balance"),
    [
        (0, "carry_over", True),
        (0, "carry_over", False),
        (0, "none", True),
        (1, "carry_over", True),
        (2, "carry_over", True),
    ],
)
def test_a_restart_goes_on_exactly(
    opened: OpenReader, two_datasets: Datasets, num_workers: int, packing: str, balance: bool
) -> None:
    options = {"num_workers": num_workers, "packing": packing, "balance_images": balance}
    whole = take(opened(two_datasets, **options), 40)
    assert len({str(pack) for pack in whole}) > 30
    first = opened(two_datasets, **options)
    state = first.state()
    assert take(first, 7) == whole[:7]
    later = first.state()
    assert take(first, 3) == whole[7:10], "taking the state changes nothing"

    second = opened(two_datasets, **options)
    second.restore(through_json(later))
    assert through_json(second.state()) == through_json(later), "the state before the first pack is the one restored"
    assert take(second, 1) == whole[7:8]
    # With workers, this state must know of those that gave no pack since the restart.
    third = opened(two_datasets, **options)
    third.restore(through_json(second.state()))
    assert take(third, 32) == whole[8:]

    if num_workers < 2:
        fresh = opened(two_datasets, **options)
        fresh.restore(through_json(state))
        assert take(fresh, 3) == whole[:3]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_packs_are_made_again_without_disturbing_the_reader(
    opened: OpenReader, two_datasets: Datasets, num_workers: int
) -> None:
    whole = take(opened(two_datasets, num_workers=num_workers), 16)
    reader = opened(two_datasets, num_workers=num_workers)
    packs = list(islice(reader, 8))
    again = opened(two_datasets, num_workers=num_workers)
    for index in (5, 0, 7):
        key = through_json(packs[index].restore_key)
        assert content(reader.restore_pack(key)) == content(again.restore_pack(key)) == whole[index]
    assert take(reader, 8) == whole[8:]
    with pytest.raises(ValueError, match="broken restore key"):
        reader.restore_pack("{}")


def test_a_state_that_does_not_fit_is_refused(opened: OpenReader, two_datasets: Datasets, tmp_path: Path) -> None:
    reader = opened(two_datasets, world_size=2)
    take(reader, 2)
    state = through_json(reader.state())
    others = {
        "rank 0": {"rank": 1, "world_size": 2},
        "world_size 2": {"world_size": 4},
        "seed 1": {"world_size": 2, "seed": 2},
        "num_workers 0": {"world_size": 2, "num_workers": 1},
        "data_hash": {"world_size": 2, "packing_buffer_size": 25},
    }
    for message, options in others.items():
        with pytest.raises(ValueError, match=f"the reader state was saved with {message}"):
            opened(two_datasets, **options).restore(state)
    for datasets in (two_datasets[:1], two_datasets[::-1], [DataSource(path=str(p), weight=2) for p in two_datasets]):
        with pytest.raises(ValueError, match="saved with data_hash"):
            opened(datasets, world_size=2).restore(state)
    with pytest.raises(ValueError, match="saved with data_hash"):
        opened(two_datasets, world_size=2, balance_images=False).restore(state)
    with pytest.raises(ValueError, match=r"with images .*bicubic.* has .*bilinear.*set it back, or begin"):
        opened(two_datasets, world_size=2, plan=SquashPlan(16, TOKENS_PER_IMAGE, "bilinear")).restore(state)
    older = {key: value for key, value in state.items() if key != "images"}
    opened(two_datasets, world_size=2).restore(older)
    with pytest.raises(ValueError, match="with template 'checkpoint 1'"):
        opened(two_datasets, world_size=2).restore(state | {"template": "checkpoint 1"})
    same = opened(two_datasets, world_size=2)
    same._former_templates = frozenset({"checkpoint 1"})
    same.restore(state | {"template": "checkpoint 1"})
    for broken in (None, [], {}, state | {"loader": "?"}, state | {"loader": "eJxTMlSyUjIEAAK0ANY="}):
        with pytest.raises(ValueError, match=r"reader state"):
            opened(two_datasets, world_size=2).restore(broken)
    moved = tmp_path / "a"
    moved.symlink_to(two_datasets[0])
    restored = opened((moved, two_datasets[1]), world_size=2)
    restored.restore(state)
    assert take(restored, 2) == take(reader, 2)


def test_a_blend_follows_the_weights(opened: OpenReader, two_datasets: Datasets) -> None:
    a, b = two_datasets
    sources = [DataSource(path=str(a), weight=3), DataSource(path=str(b), weight=1, name="words")]
    samples: list[tuple[str, int]] = []
    for pack in islice(opened(sources, seed=3), 200):
        kept = [int(source) for source in pack.segment_sources if source >= 0]
        samples += zip(pack.sample_keys, kept, strict=True)
    assert all(source == {"a": 0, "words": 1}[key.split("/")[0]] for key, source in samples)
    share = np.mean([source == 0 for _, source in samples])
    assert len(samples) > 300 and abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / len(samples)), (share, len(samples))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_balanced_packs_have_more_equal_numbers_of_images(
    opened: OpenReader, two_datasets: Datasets, num_workers: int
) -> None:
    images, padding = {}, {}
    for balance in (False, True):
        reader = opened(two_datasets, balance_images=balance, num_workers=num_workers, packing_buffer_size=48)
        packs = list(islice(reader, 200))
        images[balance] = np.std([len(pack.images) for pack in packs])
        padding[balance] = np.mean([pack.padding_tokens for pack in packs]) / 192
    assert images[True] < 0.75 * images[False], images
    assert padding[True] < padding[False] + 0.002, padding


def test_the_seed_decides_the_order(opened: OpenReader, two_datasets: Datasets) -> None:
    orders = [[key for pack in islice(opened(two_datasets, seed=s), 10) for key in pack.sample_keys] for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_share_an_epoch(opened: OpenReader, two_datasets: Datasets, num_workers: int) -> None:
    seen = []
    for rank in (0, 1):
        reader = opened(
            two_datasets[:1], rank=rank, world_size=2, packing="none", num_workers=num_workers, shuffle_buffer_size=1
        )
        seen.append([pack.sample_keys[0] for pack in islice(reader, 200)])
    for keys in seen:
        # 100 samples of its own, each as often as the others but for the window of shuffling.
        assert len(set(keys)) == 100 and Counter(Counter(keys).values()) == {2: 100}
    assert set(seen[0]).isdisjoint(seen[1])


def test_validation_is_one_pass_in_order_and_again(opened: OpenReader, two_datasets: Datasets) -> None:
    keys = {}
    for rank in (0, 1):
        reader = opened(two_datasets[:1], rank=rank, world_size=2, training=False, num_workers=1, packing="none")
        first = [content(pack) for pack in reader]
        assert [content(pack) for pack in reader] == first
        next(iter(reader))
        assert [content(pack) for pack in reader] == first, "also after a pass that was broken off"
        keys[rank] = [pack.sample_keys[0] for pack in reader]
        assert keys[rank] == sorted(keys[rank])
    assert sorted(keys[0] + keys[1]) == [f"a/a-{i:08d}" for i in range(200)]
    for balance in (False, True):
        packed = opened(two_datasets[:1], training=False, balance_images=balance)
        assert sorted(key for pack in packed for key in pack.sample_keys) == sorted(keys[0] + keys[1])


def test_without_packing_a_sample_is_a_pack(opened: OpenReader, two_datasets: Datasets) -> None:
    for pack in islice(opened(two_datasets, packing="none"), 20):
        assert len(pack.sample_keys) == 1 and len(pack.tokens) == 192
        assert pack.cu_seqlens.tolist() == [0, 192 - pack.padding_tokens, 192]
        assert pack.segment_sources[1] == -1 and pack.segment_sources[0] == pack.sample_keys[0].startswith("b/")


def test_packs_hold_the_images_of_their_slots(opened: OpenReader, two_datasets: Datasets, tokenizer: Tokenizer) -> None:
    for pack in islice(opened(two_datasets), 20):
        assert (pack.tokens == tokenizer.imgpad_id).sum() == 6 * len(pack.images)
        assert (pack.tokens == tokenizer.ids["<img>"]).sum() == len(pack.images)


def record(text: str = "red square.", images: int = 1) -> bytes:
    prompt = "".join(f"Picture {i + 1}: <img>{i}.jpg</img>\n" for i in range(images))
    turns = [{"from": "user", "value": f"{prompt}how many?"}, {"from": "assistant", "value": text}]
    return json.dumps({"id": "x", "conversations": turns}).encode()


def broken_samples() -> dict[str, dict[str, bytes]]:
    jpeg = encode_image(smooth_image(1, 40, 30))
    return {
        "no record": {"txt": b"hello"},
        "bad JSON": {"json": b"{"},
        "bad record": {"json": b'{"conversations": []}'},
        "image missing": {"json": record(), "img1": jpeg},
        "more images than slots": {"json": record(), "img0": jpeg, "img1": jpeg},
        "bad image (empty)": {"json": record(), "img0": b""},
        "bad image (not an image)": {"json": record(), "img0": b"<html>"},
        "too long": {"json": record("red square " * 200), "img0": jpeg},
    }


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_samples_are_skipped_and_counted(opened: OpenReader, tmp_path: Path, num_workers: int) -> None:
    good = {"json": record(), "img0": encode_image(smooth_image(1, 40, 30))}
    broken = broken_samples()
    data = write_raw(tmp_path / "mixed", [good] * 30 + list(broken.values()) + [good] * 30)
    # A window of samples as long as the data set: an epoch has each sample once.
    reader = opened([data], num_workers=num_workers, shuffle_buffer_size=1, packing="none")
    packs = list(islice(reader, 120))
    assert Counter(key for pack in packs for key in pack.sample_keys) == {
        f"mixed/s-{i:05d}": 2 for i in range(68) if not 30 <= i < 38
    }
    # Those behind the last good sample of the second epoch come with the pack after it.
    assert set(reader.dropped) == set(broken) and set(reader.dropped.values()) <= {1, 2}
    assert reader.dropped == sum((Counter(pack.dropped) for pack in packs), Counter())
    state = reader.state()
    again = opened([data], num_workers=num_workers, shuffle_buffer_size=1, packing="none")
    again.restore(state)
    assert [pack.dropped for pack in islice(again, 60)] == [pack.dropped for pack in islice(reader, 60)]


def test_nothing_but_broken_samples_ends_with_an_error(opened: OpenReader, tmp_path: Path) -> None:
    data = write_raw(tmp_path / "broken", list(broken_samples().values()))
    for num_workers in (0, 1):
        with pytest.raises(ValueError, match=r"1000 samples in a row are unusable.*bad JSON"):
            next(opened([data], num_workers=num_workers))


def test_text_that_is_a_control_token_of_this_tokenizer_is_dropped(tmp_path: Path) -> None:
    """``megavlm prepare`` knows no tokenizer: in Llama's, ``</s>`` ends a document."""
    data = write_raw(tmp_path / "set", [{"json": record("Yes.", 0)}, {"json": record("Yes.</s>", 0)}] * 20)
    reader = open_reader([data], load_tokenizer(write_llama(tmp_path)))
    packs = list(islice(reader, 8))
    reader.close()
    keys = [int(key.rpartition("-")[2]) for pack in packs for key in pack.sample_keys]
    assert keys and all(key % 2 == 0 for key in keys)
    assert set(reader.dropped) == {"control token"}


def test_unusable_data_sets(opened: OpenReader, two_datasets: Datasets, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        opened([tmp_path / "no"])
    with pytest.raises(ValueError, match="200 samples, too few to share among 201 readers"):
        opened(two_datasets[:1], world_size=201)
    data = DataConfig(train=(DataSource(path="x"),), tokenizer="x", sequence_length=64)
    with pytest.raises(ValueError, match="no data sets"):
        PackReader([], data, tokenizer, SquashPlan(16, 6), rank=0, world_size=1, seed=1, training=True)


def test_a_dead_worker_is_an_error_not_a_hang(opened: OpenReader, two_datasets: Datasets) -> None:
    reader = opened(two_datasets, num_workers=1)
    next(reader)
    (worker,) = reader._loader._iterator._workers
    worker.kill()
    worker.join()
    with pytest.raises(RuntimeError, match="a reader process ended"):
        reader.state()


def test_closing_ends_the_workers(opened: OpenReader, two_datasets: Datasets) -> None:
    reader = opened(two_datasets, num_workers=2)
    next(reader)
    workers = reader._loader._iterator._workers
    assert all(worker.is_alive() for worker in workers)
    reader.close()
    reader.close()
    assert not any(worker.is_alive() for worker in workers)
    assert list(reader) == []


def test_padding_is_at_most_one_percent(opened: OpenReader, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The quickstart's data and settings, with a tokenizer that did not see its texts (so samples are longer)."""
    rendered = render_dataset(tmp_path / "raw", train_images=150, heldout_images=2, image_size=32, seed=3)
    records = json.loads(rendered.train_json.read_text())
    data = prepare(tmp_path, records, name="mix", images=rendered.images_dir, samples_per_shard=100)
    reader = opened([data], sequence_length=512, packing_buffer_size=256, shuffle_buffer_size=256, system_message="")
    packs = list(islice(reader, 60))
    padding = sum(pack.padding_tokens for pack in packs) / (60 * 512)
    assert padding <= 0.01, padding
    assert not reader.dropped and len({len(pack.sample_keys) for pack in packs}) > 1


def test_workers_do_not_die_of_a_dropped_decoder(opened: OpenReader, two_datasets: Datasets) -> None:
    """DALI's pipelines have threads, which a fork has not: destroyed in a worker they end it, or never end."""
    pytest.importorskip("nvidia.dali")
    gc.collect()
    gc.disable()
    try:
        decoder = make_decoder("dali")
        decoder.decode([encode_image(smooth_image(1, 40, 40))], 28)
        decoder.circle = decoder  # type: ignore[attr-defined] # garbage that only the collector finds
        gone = weakref.ref(decoder)
        del decoder
        reader = opened(two_datasets, num_workers=1)
        assert gone() is not None
        assert len(take(reader, 30)) == 30  # the worker collects after each ten
        assert gone() is None, "it is destroyed before the fork"
    finally:
        gc.enable()
