"""Nothing in the forward and backward passes of a step reads a value that a device has yet to compute.

On a GPU each such read is a wait. Here, the operations and methods that would be one are counted during a real step.
What this cannot see: a copy from pageable memory (``torch.tensor(..., device="cuda")``), and what Megatron-Core does on
CUDA only; ``gpu_check`` counts with ``torch.cuda.set_sync_debug_mode``.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import devices
import numpy as np
import pytest
import torch
from devices import Pretended
from tiny import IMAGE_SIZE, IMAGE_TOKEN, SEQUENCE_LENGTH, tiny_recipe
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from megavlm.config import architecture as registry
from megavlm.data.batch import Pack
from megavlm.data.device_batch import make_batch
from megavlm.families.presets import load_presets
from megavlm.parallel.state import process_groups
from megavlm.training.build import build_training
from megavlm.training.step import run_batches

aten = torch.ops.aten
_WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.unique_dim.default, aten._unique2.default, aten.is_nonzero.default,
}  # fmt: skip
# Megatron-Core's, once a step: the number of tokens for the gradients' mean.
_ONCE_A_STEP = ("finalize_model_grads.py", "step.py")


class _Counting(TorchDispatchMode):
    def __init__(self, places: Counter[str], waits_for: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self.places, self.waits_for = places, waits_for

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(one, torch.Tensor) and self.waits_for(one) for one in leaves):
            return func(*args, **kwargs)
        boolean = func is aten.index.Tensor and any(i is not None and i.dtype is torch.bool for i in args[1])
        repeats = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if func in _WAITS or boolean or repeats:
            note(self.places, str(func))
        return func(*args, **kwargs)


def note(places: Counter[str], what: str) -> None:
    inside_torch = str(Path(torch.__file__).parent)
    files = [f.filename for f in traceback.extract_stack() if not f.filename.startswith(inside_torch)]
    own = [Path(name).name for name in files if name not in (__file__, devices.__file__)]
    if own[-1] not in _ONCE_A_STEP:
        places[f"{what} in {own[-1]}"] += 1


@contextlib.contextmanager
def counted_waits(monkeypatch, device: Pretended | None = None):
    """Count what would wait: of every tensor, or of those of a pretended device alone, and copies to and from it."""
    places: Counter[str] = Counter()
    waits_for = (lambda _: True) if device is None else device.has
    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            plain = getattr(torch.Tensor, name)

            def counting(self, *args, plain=plain, name=name, **kwargs):
                if waits_for(self):
                    note(places, name)
                return plain(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counting)
        if device is not None:
            _count_copies(patch, places, device)
        with _Counting(places, waits_for):
            yield places


def _count_copies(patch, places: Counter[str], device: Pretended) -> None:
    """Count copies between host and device, but those of ``to_device``, which pins what it copies."""
    moves, makes = torch.Tensor.to, torch.tensor

    def to(self, *args, **kwargs):
        moved = moves(self, *args, **kwargs)
        if device.has(moved) != device.has(self) and sys._getframe(1).f_code.co_name != "to_device":
            note(places, "a copy to the device" if device.has(moved) else "a copy to the host")
        return moved

    def cpu(self):
        return self.to("cpu")

    def tensor(*args, **kwargs):
        made = makes(*args, **kwargs)
        if device.has(made):
            note(places, "torch.tensor on the device")
        return made

    for name, one in (("to", to), ("cpu", cpu)):
        patch.setattr(torch.Tensor, name, one)
    patch.setattr(torch, "tensor", tensor)


load_presets()
CONNECTORS: dict[str, dict[str, object]] = {name: {"preset": name} for name in registry.CONNECTORS.names()}
for queries in ("resampler", "resampler_2d", "minicpm_v_2_resampler"):
    CONNECTORS[queries] |= {"num_queries": 4, "head_dim": 16}
CONNECTORS["gemma3_pool"] |= {"patches": 4}
CONNECTORS["ldpnetv2"] |= {"output_grid": 1}
CONNECTORS["c_abstractor"] |= {"output_grid": 1, "hidden_size": 32}
CONNECTORS["q_former"] |= {"num_queries": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
CONNECTORS["dense_sti"] |= {"pool": 2}
CONNECTORS["glu"] |= {"ffn_hidden_size": 96}
del CONNECTORS["codes"]  # of a tower of codes alone
_HIGH = {"high_image_size": IMAGE_SIZE, "image_size": IMAGE_SIZE, "positional_grid": 2}
PAIRS = {
    "hybrid_split": {
        **_HIGH, "preset": "siglip_sam", "patch_size": 16, "high_patch_size": 4, "high_hidden_size": 48,
        "high_num_layers": 2, "high_num_attention_heads": 4, "high_ffn_hidden_size": 64, "high_window_size": 3,
        "high_global_layers": (1,), "high_neck_size": 8, "high_output_grid": 2, "high_second_neck_layer": 1,
    },
    "patch_mining": {
        **_HIGH, "preset": "clip_convnext", "patch_size": 16, "high_depths": (1, 2, 1), "high_widths": (16, 24, 40),
        "high_feature_stages": (2, 3),
    },
}  # fmt: skip
"""Towers of connectors that join two."""
PAIRS["two_linears"] = PAIRS["hybrid_split"]
_LOW = {"hidden_size": 48, "ffn_hidden_size": 96, "num_layers": 1, "num_attention_heads": 4}
FEATURES = {"dense_sti": (2, 0, 1), "dense_sci": (2, 0, 1), "dense_dci": (0, 1, 2)}
BRANCHES = {
    "plain": {},
    "recomputed": {"parallel": {"recompute_granularity": "full"}},
    "adapters": {"lora": {"rank": 4, "alpha": 8.0}},
    "a frozen tower": {"modules": {"vision": {"freeze": True}}},
}


def batch(images, slots, shape):
    """A pack of two samples and padding, the first with ``images`` images of ``slots`` tokens and a shape of pixels."""
    tokens = np.arange(SEQUENCE_LENGTH, dtype=np.int64)
    tokens[1 : 1 + images * slots] = IMAGE_TOKEN
    lengths = np.array([60, 30, SEQUENCE_LENGTH - 90])
    one = Pack(
        tokens=tokens, labels=np.roll(tokens, -1), position_ids=np.concatenate([np.arange(n) for n in lengths]),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32), segment_sources=np.array([0, 0, -1], np.int32), images=[],
        sample_keys=[],
    )  # fmt: skip
    pixels = torch.zeros(images, *shape, dtype=torch.uint8)
    return make_batch(one, pixels, torch.device("cpu"))


@pytest.mark.parametrize(
    ("connector", "branches"),
    [*((name, "plain") for name in CONNECTORS), *(("resampler", name) for name in BRANCHES if name != "plain")],
)
def test_no_wait_in_forward_and_backward(monkeypatch, connector, branches):
    preset = connector.replace("<N>", "2")
    model = {"connector": {**CONNECTORS[connector], "preset": preset}}
    if connector in FEATURES:
        model["vision"] = {"image_size": IMAGE_SIZE, "feature_layers": FEATURES[connector], "num_layers": 2}
    if connector in PAIRS:
        model["vision"] = PAIRS[connector] | _LOW
    recipe = tiny_recipe(model=model, **BRANCHES[branches])
    with process_groups(recipe.parallel, 1):
        training = build_training(recipe, IMAGE_TOKEN)
        slots, shape = recipe.model.tokens_per_view, recipe.model.vision.pixel_shape
        batches = [batch(images, slots, shape) for images in (2, 0)]
        run_batches(training.chunks, batches, 1)  # what is made once
        with counted_waits(monkeypatch) as places:
            run_batches(training.chunks, batches, 1)
    assert not places, places


def test_the_count_sees_them(monkeypatch):
    with counted_waits(monkeypatch) as places:
        values = torch.ones(3)
        values.tolist()
        assert values[0].item() == 1.0
        values[values > 0]
    assert sum(places.values()) >= 3
