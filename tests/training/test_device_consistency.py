"""No tensor is on the wrong device: step, feed, save and resume, with a device that is pretended (``devices``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICE, Pretended, WrongDevice, pretended_device
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe

from megavlm.architectures.towers.vit.build import VisionTransformer
from megavlm.checkpoint.distributed import load
from megavlm.checkpoint.saver import Saver, State
from megavlm.data.device_batch import make_batch, share_packs
from megavlm.data.read_pack import ReadPack
from megavlm.parallel.state import process_groups
from megavlm.training.build import build_training
from megavlm.training.optimizer import recipe_settings_kept
from megavlm.training.step import train_step

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a device where there is none")


@pytest.fixture
def device() -> Iterator[Pretended]:
    with pretended_device() as device:
        yield device


def train(**branches: Any) -> Any:
    """Take two steps of real packs; return what was trained."""
    recipe = tiny_recipe(**branches)
    training = build_training(recipe, IMAGE_TOKEN)
    for step in range(2):
        packs = random_packs(3, seed=step)
        batches = [make_batch(pack, torch.from_numpy(pixels), DEVICE) for pack, pixels in packs]
        training.scheduler.step(1)
        result = train_step(training.chunks, training.optimizer, batches, num_sources=1)
        assert result.loss > 0 and result.grad_norm
    return recipe, training


BRANCHES: dict[str, dict[str, Any]] = {
    "bf16": {"training": {"precision": "bf16"}},
    "fp32, plain optimizer": {"parallel": {"use_distributed_optimizer": False}},
    "recomputed": {"parallel": {"recompute_granularity": "full"}},
    "adapters": {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}},
    "a frozen tower": {"modules": {"vision": {"freeze": True}}},
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_step_a_save_and_a_resume(name: str, device: Pretended, tmp_path: Path) -> None:
    with process_groups(tiny_recipe().parallel, 1):
        recipe, training = train(**BRANCHES[name])
        assert all(device.has(parameter) for module in training.modules for parameter in module.parameters())
        with training.settled():
            state = State(training.modules, training.optimizer, training.scheduler, run={"step": 2})
            saver = Saver(tmp_path, keep=1, asynchronous=True)
            saver.save(state)
            saved = saver.finish()
        again = build_training(recipe, IMAGE_TOKEN)
        assert saved is not None
        with recipe_settings_kept(again.optimizer):
            load(saved, modules=again.modules, optimizer=again.optimizer, scheduler=again.scheduler)
        assert all(device.has(parameter) for module in again.modules for parameter in module.parameters())


def test_what_the_feed_shares_is_on_the_device(device: Pretended) -> None:
    with process_groups(tiny_recipe().parallel, 1):
        packs = random_packs(3, seed=1)
        for batch in share_packs([ReadPack(pack, torch.from_numpy(pixels)) for pack, pixels in packs], 3):
            mine = (batch.tokens, batch.labels, batch.position_ids, batch.segment_sources, batch.images)
            assert all(device.has(one) for one in mine if one is not None and one.numel())
            assert device.has(batch.packed_seq_params.cu_seqlens_q)


@pytest.mark.parametrize(
    "slip", [lambda x: torch.arange(x.size(-1)), lambda x: torch.ones(1, device="cpu"), lambda x: x.cpu()[..., :1]]
)
def test_a_slip_in_a_model_is_seen(slip: Any, device: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = VisionTransformer.forward
    monkeypatch.setattr(VisionTransformer, "forward", lambda self, x: (y := plain(self, x)) + slip(y) * 0)
    meeting = pytest.raises(WrongDevice, match=r"add\.Tensor|mul\.Tensor")
    with process_groups(tiny_recipe().parallel, 1), meeting as caught:
        train()
    assert any(Path(entry.path).name == Path(__file__).name for entry in caught.traceback)
