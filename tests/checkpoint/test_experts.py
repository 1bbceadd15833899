"""Checkpoints of models with experts: any TP x PP x EP to any other, what is said of a missing one, and proofs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from expert_checkpoint_cases import BIASED, STACKED, VOCABULARY
from run_cases import numbers, tensors
from tiny import tiny_recipe

from megavlm.checkpoint.hf.incoming import Report, _initialise
from megavlm.checkpoint.hf.shapes import alone
from megavlm.checkpoint.slots import find_slots

TP2, PP2, EP2 = ({f"{name}_model_parallel_size": 2} for name in ("tensor", "pipeline", "expert"))
PLAIN = {"use_distributed_optimizer": False}
Place = tuple[int, dict[str, Any]]
# Where it was trained; where it was loaded and saved again, one after the other.
CHAINS: dict[str, tuple[dict[str, Any], tuple[Place, ...]]] = {
    # A dense first layer, shared experts, groups, and biases by which experts are chosen.
    "biased": (
        BIASED,
        ((4, {**TP2, **EP2, "sequence_parallel": True}), (1, {}), (4, {**PP2, **EP2}), (2, {**EP2, **PLAIN})),
    ),
    "stacked": (STACKED, ((2, {**EP2, **PLAIN}), (4, {**TP2, "sequence_parallel": True}), (2, EP2), (1, PLAIN))),
    # Of two stages one has no expert.
    "on the last stage": (
        {**STACKED, "moe_layer_freq": [0, 0, 1, 1]},
        ((4, {**PP2, **EP2, **PLAIN}), (4, {**PP2, **EP2, **PLAIN}), (4, {**PP2, **EP2}), (1, {})),
    ),
    "on the first stage": (
        {**STACKED, "moe_layer_freq": [1, 1, 0, 0]},
        ((4, {**PP2, **EP2}), (4, {**PP2, **EP2, **PLAIN}), (4, {**PP2, **EP2, **PLAIN}), (4, {**PP2, **EP2})),
    ),
}
LONG = ("on the last stage", "on the first stage")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] if n in LONG else []) for n in CHAINS])
def test_a_change_of_layout_changes_no_bit(name: str, tmp_path: Path) -> None:
    """Weights, masters, moments, and biases; with the other optimizer, and another learning rate, too."""
    language, chain = CHAINS[name]
    first: dict[str, str] = {}
    load: str | None = None
    for number, (world, layout) in enumerate(chain):
        root = tmp_path / str(number)
        rate = 1e-3 * (1 + number)
        ranks.run("expert_checkpoint_cases:train", language, layout, str(root), load, world=world, timeout=600, lr=rate)
        load = str(root / "step-00000002")
        found = tensors(Path(load), VOCABULARY)
        first = first or found
        assert found == first, [key for key in found.keys() | first.keys() if found.get(key) != first.get(key)]
    experts = [key for key in first if ".mlp.experts.experts." in key]
    assert {key.removeprefix("optimizer.state.").partition(".")[0] for key in experts} == {
        "language", "param", "exp_avg", "exp_avg_sq"
    }  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("alone", [False, True])
def test_adapters_of_experts_change_their_layout(alone: bool, tmp_path: Path) -> None:
    """Bit for bit, masters and moments too; each expert's have a place of their own. Also where nothing else learns."""
    ranks.run("expert_checkpoint_cases:save_base", BIASED, str(tmp_path / "base"))
    beside = () if alone else ("attn.c_attn", "w1", "shared_experts.gate_proj", "shared_experts.down_proj")
    lora = {"rank": 4, "targets": (*beside, "experts.gate_proj", "experts.down_proj")}
    first: dict[str, str] = {}
    load: str | None = None
    places: tuple[Place, ...] = (
        (4, {**TP2, **EP2, "sequence_parallel": True, "expert_tensor_parallel_size": 2}),
        (4, {**PP2, **EP2, **PLAIN}),
        (1, {}),
    )
    for number, (world, layout) in enumerate(places):
        root = tmp_path / str(number)
        ranks.run(
            "expert_checkpoint_cases:train", BIASED, layout, str(root), load, world=world, timeout=600, lora=lora,
            alone=alone, base=str(tmp_path / "base" / "step-00000000"),
        )  # fmt: skip
        load = str(root / "step-00000002")
        found = tensors(Path(load), VOCABULARY)
        first = first or found
        assert found == first, [key for key in found.keys() | first.keys() if found.get(key) != first.get(key)]
    experts = [key for key in first if ".mlp.experts.experts." in key]
    assert len(experts) == 3 * 2 * 2 * 4 and all(key.endswith((".lora_a", ".lora_b")) for key in experts)
    assert len({first[key] for key in experts}) == len(experts)
    shared = [key for key in first if ".mlp.shared_experts." in key]
    assert len(shared) == (0 if alone else 3 * 2 * 2 * 4)


@pytest.mark.long
def test_experts_in_4_bits_train_like_what_the_library_makes_of_them(tmp_path: Path) -> None:
    """Adapters of attention, MLP, experts and shared ones beside NF4 weights, and beside these in full: alike."""
    root = str(tmp_path)
    (rounded,) = ranks.run("expert_checkpoint_cases:save_bases", root)
    assert rounded == 2 * 2 + 2 + 2 + 4 * 2  # attention of two layers, an MLP, shared experts, experts
    alone = [("full", {}, "rounded", None), ("whole", {}, "base", None), ("nf4", {}, "base", "nf4")]
    full, whole, nf4 = ranks.run("expert_checkpoint_cases:train_wide", root, alone)[0]
    sp = {**TP2, "sequence_parallel": True}
    layouts = [("ep", EP2, "base", "nf4"), ("tp", sp, "base", "nf4"), ("both", {**sp, **EP2}, "base", "nf4")]
    found = ranks.run("expert_checkpoint_cases:train_wide", root, layouts, world=2)[0]
    assert whole != pytest.approx(full, rel=1e-3), "4 bits make a difference"
    expected = numbers(tmp_path / "full" / "step-00000002")
    for losses, name in zip([nf4, *found], ["nf4", "ep", "tp", "both"], strict=True):
        assert losses == pytest.approx(full, rel=1e-5), name
        own = numbers(tmp_path / name / "step-00000002")
        learnt = [key for key in expected if key.endswith((".lora_a", ".lora_b")) and not key.startswith("optimizer.")]
        assert learnt and all(torch.allclose(own[key], expected[key], rtol=0, atol=1e-4) for key in learnt), name


@pytest.mark.long
def test_the_other_optimizer_goes_on_in_fp32(tmp_path: Path) -> None:
    """Where the plain one has no masters, and its parameter groups elsewhere."""
    found, load = [], None
    for number, layout in enumerate((EP2, {**EP2, **PLAIN}, {**EP2, **PLAIN}, EP2)):
        root = tmp_path / str(number)
        ranks.run("expert_checkpoint_cases:train", STACKED, layout, str(root), load, precision="fp32", world=2)
        load = str(root / "step-00000002")
        whole = tensors(Path(load), VOCABULARY)
        found.append({key: one for key, one in whole.items() if not key.startswith("optimizer.state.param.")})
    assert all(one == found[0] for one in found) and any(".exp_avg.language" in key for key in found[0])


def test_a_save_in_a_thread_has_the_biases_of_its_step(tmp_path: Path) -> None:
    (biases,) = ranks.run("expert_checkpoint_cases:save_while_biases_move", str(tmp_path))
    assert biases == {0.0}


def test_a_part_that_is_initialised_has_the_biases_that_choose_experts() -> None:
    """Zeros of fp32, whatever type the weights have; they are no parameters, and not counted."""
    model, report = tiny_recipe(model={"language": BIASED}).model, Report({})
    with alone():
        slots = find_slots(model, ["language"])
        pieces = _initialise("language", model, slots, torch.bfloat16, report)
    biases = [piece for piece in pieces if piece.slot.key.endswith(".expert_bias")]
    assert len(pieces) == len(slots) and len(biases) == 3
    assert all(piece.dtype == torch.float32 and not piece.read().any() for piece in biases)
    assert {piece.dtype for piece in pieces if piece not in biases} == {torch.bfloat16}
    numbers = sum(torch.Size(piece.slot.shape).numel() for piece in pieces if piece not in biases)
    assert f"{numbers:,} parameters" in report.fresh[0]
