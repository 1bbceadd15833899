"""Hands packs to the ranks of a layout and checks on every rank what came; run under torchrun.

Arguments: layouts such as 2x1, tensor-parallel times pipeline-parallel size. What fails here fails the test, by the
exit code.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator

from megavlm.parallel.device import prepare_device

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from PIL import Image  # noqa: E402
from tiny import IMAGE_SIZE, IMAGE_TOKEN, SEQUENCE_LENGTH, TOKENS_PER_IMAGE, random_packs  # noqa: E402

from megavlm.config.schema import ParallelConfig  # noqa: E402
from megavlm.data.batch import Pack  # noqa: E402
from megavlm.data.decoders import make_decoder  # noqa: E402
from megavlm.data.device_batch import Batch, share_packs  # noqa: E402
from megavlm.data.feed import Feed, Prefetcher  # noqa: E402
from megavlm.data.plans_single import SquashPlan  # noqa: E402
from megavlm.data.read_pack import ReadPack  # noqa: E402
from megavlm.parallel.state import is_first_stage, is_last_stage, is_reader, process_groups  # noqa: E402

PLAN = SquashPlan(IMAGE_SIZE, TOKENS_PER_IMAGE)


class Source:
    """Packs of the replica ``seed``; at the end an error."""

    def __init__(self, packs: list[Pack]) -> None:
        self.packs = packs

    def __iter__(self) -> Iterator[Pack]:
        yield from self.packs
        raise OSError("the disk is gone")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def check(batches: list[Batch], expected: list[tuple[Pack, np.ndarray]]) -> None:
    assert len(batches) == len(expected)
    for batch, (pack, pixels) in zip(batches, expected, strict=True):
        assert (batch.labels is not None) == is_last_stage()
        for name in ("tokens", "position_ids", *(["labels"] if is_last_stage() else [])):
            got = getattr(batch, name)
            assert got.dtype == torch.int64 and np.array_equal(got.numpy(), getattr(pack, name)[None]), name
        assert (batch.loss_weights is not None) == (is_last_stage() and pack.loss_weights is not None)
        if batch.loss_weights is not None:
            assert np.array_equal(batch.loss_weights.numpy(), pack.loss_weights[None])
        borders = batch.packed_seq_params.cu_seqlens_q
        assert borders.dtype == torch.int32 and np.array_equal(borders.numpy(), pack.cu_seqlens)
        assert np.array_equal(batch.segment_sources.numpy(), pack.segment_sources)
        assert batch.token_sources.shape == (SEQUENCE_LENGTH,)
        assert batch.num_images == len(pixels)
        if is_first_stage():
            assert batch.images is not None and batch.images.dtype == torch.uint8
            assert np.array_equal(batch.images.numpy(), pixels)
        else:
            assert batch.images is None


def raises(call: Callable[[], object], message: str) -> None:
    try:
        call()
    except RuntimeError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"nobody said {message!r}")


def run() -> None:
    replica, replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    expected = random_packs(4, seed=replica)
    expected[2][0].loss_weights = np.random.default_rng(replica).random(SEQUENCE_LENGTH, np.float32)
    packs = [ReadPack(pack, torch.from_numpy(pixels)) for pack, pixels in expected]
    check(share_packs(packs if is_reader() else None, 4), expected)
    raises(lambda: share_packs(None, 4), "reader of this data-parallel replica")
    # After an error, the next call works: all ranks are at the same place.
    texts = [item for item in expected if not len(item[1])]
    packs = [one for one in packs if not len(one.pixels)]
    check(share_packs(packs[:1] if is_reader() else None, 1), texts[:1])

    prefetcher = None
    if is_reader():
        for pack, own in expected:
            pack.images = [png(image) for image in own]
        # The last replica's reader breaks in the second step; the others are well.
        source = Source([pack for pack, _ in (expected[:3] if replica == replicas - 1 else expected)])
        prefetcher = Prefetcher(source, make_decoder("pil"), PLAN, IMAGE_TOKEN, depth=2)
    # The packs of a step come in the order that the feed is given, with their own pixels.
    feed = Feed(prefetcher, order=lambda images: [1, 0] if images[0] else [0, 1])
    assert len(expected[0][1]) > 0
    check(feed.next_step(2), expected[1::-1])
    for _ in range(2):
        raises(lambda: feed.next_step(2), "a reader failed")
    feed.close()
    # One write: lines of several ranks must not mix.
    sys.stdout.write(f"rank {dist.get_rank()} is well\n")
    sys.stdout.flush()


def main() -> None:
    with process_groups(ParallelConfig(), 1):
        for layout in sys.argv[1:]:
            tp, pp = map(int, layout.split("x"))
            mpu.destroy_model_parallel()
            mpu.initialize_model_parallel(tp, pp)
            run()


if __name__ == "__main__":
    main()
