"""Every part on a device that is pretended (``devices``): no tensor on the wrong one, no wait in a step.

A step's forward and backward passes must read nothing that the device has yet to compute, and copy to it what was
pinned before: each other copy waits for all that the device has to do. What this cannot see: see ``devices``, and
:mod:`test_no_waits`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import every_part
import pytest
import torch
from devices import DEVICE, Pretended, WrongDevice, pretended_device
from family_choice import changed_of
from test_matrix import PARTS, parts_of
from test_no_waits import counted_waits
from tiny import IMAGE_TOKEN

from megavlm.checkpoint.distributed import load, save_weights
from megavlm.checkpoint.saver import Saver, State
from megavlm.layers.segments import to_device
from megavlm.parallel.state import process_groups
from megavlm.training.build import TrainingModel, build_training
from megavlm.training.optimizer import recipe_settings_kept
from megavlm.training.step import run_batches, train_step

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a device where there is none"),
]

ALWAYS = ("bf16", "adapters", "tower on all ranks", "tiles", "films, M-RoPE", "experts, all")
"""What is walked after every change; the others where a part or what all import changed, as the tests of families."""
# Experts take as many tokens as chose them, and the host cuts these apart: Megatron-Core's own, in each such layer.
EXPERTS_OWN = {
    "tolist in experts.py",  # SequentialMLP
    "aten.masked_select.default in moe_utils.py",  # the permutation, without Transformer Engine's kernel
    "tolist in moe_utils.py",  # chunks in the order of the experts
}


def walk(part: every_part.Part, device: Pretended, monkeypatch: pytest.MonkeyPatch, root: Path | None) -> Counter[str]:
    """Take a step; save and resume under ``root``; return the waits of a step behind it."""
    with process_groups(part.recipe.parallel, 1):
        training = build_training(part.recipe, IMAGE_TOKEN)
        if part.base is not None:
            assert root is not None
            save_weights(root / "base", build_training(part.base, IMAGE_TOKEN).modules)
            load(root / "base" / "step-00000000", modules=training.modules)
            training.optimizer.reload_model_params()
        check_weights(training, device)
        batches = part.batches(0)
        training.scheduler.step(1)
        result = train_step(training.chunks, training.optimizer, batches, num_sources=1, vision=training.vision)
        assert result.loss > 0 and result.grad_norm is not None  # 0 of adapters behind a gate that is shut
        batches, places = part.batches(0), Counter[str]()
        if training.vision is None:
            with counted_waits(monkeypatch, device) as places:
                run_batches(training.chunks, batches, 1)
            training.optimizer.zero_grad()
        if root is not None:
            check_weights(resumed(part, training, root), device)
    return places


def resumed(part: every_part.Part, training: TrainingModel, root: Path) -> TrainingModel:
    """Save a model, and return another one that goes on from there."""
    base = None if part.base is None else root / "base" / "step-00000000"
    with training.settled():
        state = State(training.modules, training.optimizer, training.scheduler, run={"step": 1}, base=base)
        Saver(root, keep=1).save(state)
    again = build_training(part.recipe, IMAGE_TOKEN)
    with recipe_settings_kept(again.optimizer):
        load(
            root / "step-00000001", modules=again.modules, optimizer=again.optimizer, scheduler=again.scheduler,
            base=base,
        )  # fmt: skip
    return again


def check_weights(training: TrainingModel, device: Pretended) -> None:
    assert all(device.has(one) for module in training.modules for one in module.parameters())


def check(part_of: Callable[[], every_part.Part], monkeypatch: pytest.MonkeyPatch, root: Path | None) -> None:
    """Walk a part, and say which of its waits are not Megatron-Core's for experts."""
    with every_part.experts_as_on_a_gpu(monkeypatch), pretended_device() as device:
        part = part_of()
        places = walk(part, device, monkeypatch, root)
    if getattr(part.recipe.model.language, "num_moe_experts", None):
        assert EXPERTS_OWN & set(places), "what is excused is not there any more"
        places = Counter({place: count for place, count in places.items() if place not in EXPERTS_OWN})
    assert not places, places


@pytest.mark.parametrize("name", [name for name in every_part.MAKERS if name in ALWAYS])
def test_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(every_part.MAKERS[name], monkeypatch, tmp_path)


@pytest.mark.family("every_part", parts=PARTS)
@pytest.mark.parametrize("name", [name for name in every_part.MAKERS if name not in ALWAYS])
def test_more_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(every_part.MAKERS[name], monkeypatch, tmp_path)


@pytest.mark.family("every_part", parts=PARTS)
def test_everything_registered(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """In one test: which models there are is known when they were made."""
    wrong = []
    models = {str(number): parts_of(number) for number in range(every_part.registered_count())}
    for number in map(int, changed_of(request.config, request.path, models)):
        try:
            check(functools.partial(every_part.registered, number), monkeypatch, None)
        except (AssertionError, WrongDevice) as error:
            wrong.append(f"{every_part.chosen(number)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_a_wait_and_a_copy_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_device() as device, counted_waits(monkeypatch, device) as places:
        there = torch.tensor([1.0, 2.0], device="cuda")
        there.tolist()
        there[there > 1]
        there.cpu()
        assert torch.ones(2).to("cuda").sum().item() == 2 and sum(places.values()) >= 6, places
        before = sum(places.values())
        torch.ones(2).tolist()  # of the host
        to_device(torch.ones(2), DEVICE)
        assert sum(places.values()) == before, places
