"""Every part on a device that is pretended (``devices``): no tensor on the wrong one, no wait in a step.

A step's forward and backward passes must read nothing that the device has yet to compute, and copy to it what was
pinned before: each other copy waits for all that the device has to do. What this cannot see: see ``devices``, and
:mod:`test_no_waits`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import every_part
import pytest
import torch
from devices import Pretended, pretended_device
from test_no_waits import counted_waits
from tiny import IMAGE_TOKEN

from megavlm.checkpoint.distributed import load, save_weights
from megavlm.checkpoint.saver import Saver, State
from megavlm.parallel.state import process_groups
from megavlm.training.build import build_training
from megavlm.training.optimizer import recipe_settings_kept
from megavlm.training.step import run_batches, train_step

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a device where there is none"),
]

# Experts without a capacity that is the same for all take as many tokens as chose them, and the host cuts them apart.
EXPERTS_OWN = {
    "tolist in experts.py",  # Megatron-Core's SequentialMLP
    "aten.masked_select.default in moe_utils.py",  # its permutation without Transformer Engine's kernel
}


def walk(name: str, device: Pretended, root: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Take a step, save, resume; return the waits of a later step."""
    part = every_part.part(name)
    with process_groups(part.recipe.parallel, 1):
        training = build_training(part.recipe, IMAGE_TOKEN)
        if part.base is not None:
            save_weights(root / "base", build_training(part.base, IMAGE_TOKEN).modules)
            load(root / "base" / "step-00000000", modules=training.modules)
            training.optimizer.reload_model_params()
        assert all(device.has(one) for module in training.modules for one in module.parameters())
        training.scheduler.step(1)
        result = train_step(
            training.chunks, training.optimizer, part.batches(0), num_sources=1, vision=training.vision
        )  # fmt: skip
        assert result.loss > 0 and result.grad_norm
        batches = part.batches(0)
        if training.vision is not None:
            places: Counter[str] = Counter()
        else:
            with counted_waits(monkeypatch, device) as places:
                run_batches(training.chunks, batches, 1)
            training.optimizer.zero_grad()
        with training.settled():
            state = State(training.modules, training.optimizer, training.scheduler, run={"step": 1})
            state.base = None if part.base is None else root / "base" / "step-00000000"
            Saver(root, keep=1).save(state)
        again = build_training(part.recipe, IMAGE_TOKEN)
        with recipe_settings_kept(again.optimizer):
            load(
                root / "step-00000001", modules=again.modules, optimizer=again.optimizer, scheduler=again.scheduler,
                base=state.base,
            )  # fmt: skip
        assert all(device.has(one) for module in again.modules for one in module.parameters())
    return places


@pytest.mark.parametrize("name", every_part.names())
def test_on_the_device_and_without_waits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with every_part.experts_as_on_a_gpu(monkeypatch), pretended_device() as device:
        places = walk(name, device, tmp_path, monkeypatch)
    language = every_part.part(name).recipe.model.language
    if getattr(language, "num_moe_experts", None):
        assert EXPERTS_OWN & set(places), "what is excused is not there any more"
        places = Counter({place: count for place, count in places.items() if place not in EXPERTS_OWN})
    assert not places, places
