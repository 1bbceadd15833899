"""Models with experts train at every layout like one process, towards the objective that the docs name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import expert_run_cases as cases
import pytest
import ranks
import torch
import torch.nn.functional as F
from tiny import IMAGE_TOKEN
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megavlm.config.schema import ParallelConfig
from megavlm.data.batch import IGNORE_INDEX
from megavlm.layers.experts import PackRouter, routers_of
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups
from megavlm.training.build import build_training
from megavlm.training.experts import scale_losses, take_report
from megavlm.training.step import run_batches

EQUAL = 1e-5
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2, EP4 = {"expert_model_parallel_size": 2}, {"expert_model_parallel_size": 4}
VPP2, OVERLAP = {"virtual_pipeline_model_parallel_size": 2}, {"overlap_grad_reduce": True, "overlap_param_gather": True}
FROZEN = {"modules": {"language": {"freeze": True}}}
LORA = {"lora": {"rank": 4, "alpha": 8.0, "targets": ["attn.c_attn", "attn.c_proj"]}}
# Beside gate, up and down of each expert, the shared ones and the dense layer; and beside some of them.
ADAPTERS = {"lora": {"rank": 4, "alpha": 8.0, "targets": ["attn.c_attn", "w1", "gate_proj", "up_proj", "down_proj"]}}
# Nothing beside experts: Megatron-Core has an optimizer of theirs alone.
ALONE = {
    "lora": {"rank": 2, "alpha": 8.0, "targets": ["experts.up_proj", "experts.down_proj"]},
    "modules": {"vision": {"freeze": True}, "connector": {"freeze": True}},
}
SOME = {"lora": {"rank": 3, "alpha": 8.0, "targets": ["up_proj"], "train_head": True}}
MODELS = {"all": cases.ALL, "mixed": cases.MIXED, "biased": cases.ALL | {"add_bias_linear": True}}
# By ranks: model, layout, other branches.
QUICK: dict[int, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {
    2: [("mixed", TP2 | EP2, {})],
    4: [("mixed", PP2 | VPP2 | EP2, {})],
}
LONG: dict[int, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {
    2: [
        ("all", EP2 | {"recompute_granularity": "full"}, {}),
        ("mixed", EP2 | {"recompute_granularity": "full"}, {}),
        ("mixed", EP2 | {"recompute_granularity": "selective"}, {}),
        ("all", EP2 | {"use_distributed_optimizer": False}, {}),
        ("mixed", EP2, {}),
        ("all", TP2 | EP2, {}),
        ("mixed", TP2, {}),
        ("mixed", PP2, {}),
        ("all", EP2, FROZEN),
        ("mixed", EP2, LORA),
        ("mixed", TP2 | EP2, LORA),
        ("mixed", EP2, ADAPTERS),
        ("mixed", TP2 | EP2, ADAPTERS),
        ("mixed", TP2, ADAPTERS),
        ("biased", TP2 | EP2, {}),
        ("all", EP2 | {"recompute_granularity": "full"}, SOME),
        ("mixed", TP2 | EP2, ALONE),
    ],
    4: [
        ("all", EP4, {}),
        ("mixed", EP2, {}),
        ("mixed", EP4, {}),
        ("all", EP2 | OVERLAP | {"ddp_bucket_size": 9000}, {}),
        ("mixed", TP2 | EP2, {}),
        ("mixed", TP2 | EP2 | {"expert_tensor_parallel_size": 2}, {}),
        ("mixed", PP2 | EP2, {}),
        ("mixed", TP2 | EP4, {}),
        ("all", PP2 | VPP2 | EP2 | OVERLAP | {"ddp_bucket_size": 9000}, {}),
        ("mixed", TP2 | PP2 | EP2, {}),
        ("mixed", TP2 | EP2 | {"expert_tensor_parallel_size": 2}, ADAPTERS),
        ("mixed", TP2 | PP2 | EP2, ADAPTERS),
        ("all", EP2 | {"use_distributed_optimizer": False}, SOME),
        ("mixed", EP2, ALONE),
        ("all", TP2 | PP2 | VPP2 | EP2 | {"recompute_granularity": "full"}, {}),
    ],
}

SHARED: dict[int, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {
    2: [
        ("all", CP2, {}),
        ("mixed", CP2, {}),
        ("all", CP2 | EP2 | {"recompute_granularity": "full"}, {}),
    ],
    4: [
        ("mixed", CP2 | EP2, {}),
        ("mixed", CP2 | EP4, {}),
        ("mixed", CP2 | TP2 | EP4, {}),
        ("mixed", CP2 | PP2 | EP2, {}),
        # Ranks of two replicas, whose packs are filled up to other lengths, share an expert.
        ("mixed", CP2 | EP2 | {"expert_tensor_parallel_size": 2}, {}),
    ],
}
"""Packs that context-parallel ranks share: losses and loads are of the pack, and nothing of what fills it up."""


def check(tmp: Path, layouts: dict[int, list[tuple[str, dict[str, Any], dict[str, Any]]]]) -> None:
    """Train each in one start of ranks a size; compare with one process, which has a folder a model and branches."""

    def folder(model: str, branches: dict[str, Any]) -> str:
        rank = branches.get("lora", {}).get("rank", 0)
        return str(tmp / f"{model}-{'-'.join(branches)}-{rank}-{len(branches.get('lora', {}).get('targets', ()))}")

    alone: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}
    for model, _, branches in (one for group in layouts.values() for one in group):
        alone[folder(model, branches)] = (folder(model, branches), MODELS[model], branches)
    results = ranks.run(cases.train_all, list(alone.values()))[0]
    expected = dict(zip(alone, results, strict=True))
    for world, group in layouts.items():
        jobs = [(folder(model, rest), MODELS[model], {"parallel": layout, **rest}) for model, layout, rest in group]
        for rank in ranks.run(cases.train_all, jobs, world=world, timeout=600):
            for (own, _, branches), got in zip(jobs, rank, strict=True):
                same(got, expected[own], f"{world} ranks, {branches}")


def same(got: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    assert got["loads"] == expected["loads"] and got["dropped"] == expected["dropped"], what
    for key in ("loss", "grad_norm"):
        assert got[key] == pytest.approx(expected[key], rel=EQUAL), f"{what}: {key}"
    for step, (own, known) in enumerate(zip(got["losses"], expected["losses"], strict=True)):
        assert own == pytest.approx(known, rel=EQUAL), f"{what}: losses of step {step}"
    assert got["biases"] == {layer: expected["biases"][layer] for layer in got["biases"]}, what
    assert got["apart"] < EQUAL, f"{what}: {got['worst']}"


def test_layouts_equal_one_process(tmp_path: Path) -> None:
    check(tmp_path, QUICK)


@pytest.mark.long
def test_more_layouts_equal_one_process(tmp_path: Path) -> None:
    check(tmp_path, LONG)


def test_losses_are_of_real_tokens_and_the_mean_over_packs() -> None:
    """Gradients of the loss + coefficients x mean over packs, with Transformers' balance loss of each layer."""
    with process_groups(ParallelConfig(), seed=3):
        recipe = cases.recipe_of(cases.ALL | {"moe_aux_loss_coeff": 0.7, "moe_z_loss_coeff": 0.05})
        training = build_training(recipe, IMAGE_TOKEN)
        bare = unwrap(build_model(recipe, IMAGE_TOKEN)[0])
        bare.load_state_dict(training.modules[0].state_dict())
        batches = cases.batches_of(recipe, 0)
        assert any(int(batch.segment_sources[-1]) < 0 for batch in batches), "some pack has padding"
        config = training.configs[0]
        scale_losses(training.chunks, batches, config)
        for chunk in training.chunks:
            chunk.zero_grad_buffer()
        run_batches(training.chunks, batches, num_sources=1)
        report = take_report(training.chunks, len(batches), config)
        assert report is not None

        bare.config.moe_aux_loss_coeff, bare.config.moe_z_loss_coeff = 0.0, None
        seen: list[torch.Tensor] = []
        routers = [router for _, router in routers_of(bare)]
        for router in routers:
            router.register_forward_pre_hook(lambda router, args: seen.append(F.linear(args[0], router.weight)))
        tokens = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches if batch.labels is not None)
        objective, balances, squares = torch.zeros(()), torch.zeros(len(routers)), torch.zeros(len(routers))
        loads = torch.zeros(len(routers), cases.EXPERTS, dtype=torch.int64)
        for batch in batches:
            assert batch.labels is not None
            seen.clear()
            losses = bare(**batch.inputs(with_labels=True))
            objective = objective + losses[batch.labels != IGNORE_INDEX].sum() / tokens
            real = batch.token_sources >= 0
            for layer, logits_S1X in enumerate(seen):
                logits = logits_S1X[:, 0]
                balance = load_balancing_loss_func((logits,), cases.EXPERTS, 2, real[None]) / 2
                z = logits[real].logsumexp(-1).square().mean()
                objective = objective + (0.7 * balance + 0.05 * z) / len(batches)
                balances[layer] += balance.detach() / len(batches)
                squares[layer] += z.detach() / len(batches)
                loads[layer] += torch.bincount(logits[real].topk(2).indices.flatten(), minlength=cases.EXPERTS)
        objective.backward()
        assert report.loads.tolist() == loads.tolist()
        torch.testing.assert_close(report.losses.float(), torch.stack([balances, squares], 1), rtol=1e-5, atol=0)
        own = dict(training.modules[0].named_parameters())
        for name, parameter in bare.named_parameters():
            if not parameter.requires_grad:
                continue
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            atol = 1e-5 * float(grad.abs().max()) + 1e-8
            torch.testing.assert_close(own[name].main_grad, grad, rtol=0, atol=atol, msg=name)


def test_biases_move_towards_equal_loads_and_full_experts_take_the_best(tmp_path: Path) -> None:
    found = ranks.run(cases.train, str(tmp_path), cases.MIXED, {}, 2)[0]
    expected = torch.zeros(3, cases.EXPERTS)
    for loads in found["loads"]:
        counts = torch.tensor(loads, dtype=torch.float32)
        expected += 0.01 * torch.sign(counts.mean(1, keepdim=True) - counts)
    torch.testing.assert_close(torch.tensor([found["biases"][layer] for layer in (1, 2, 3)]), expected)
    assert all(dropped > 0 for step in found["dropped"] for dropped in step)

    with process_groups(ParallelConfig(), seed=3):
        recipe = cases.recipe_of(cases.ALL | {"moe_expert_capacity_factor": 1.0})
        router = next(router for _, router in routers_of(unwrap(build_model(recipe, IMAGE_TOKEN)[0])))
        logits = torch.randn(10, 1, cases.EXPERTS, generator=torch.Generator().manual_seed(1))
        padding = torch.arange(10)[:, None] >= 8
        plain, every = router.eval().routing(logits, padding)
        probs, taken = router.train().routing(logits, padding)
        assert every.sum() == 20, "nothing is left out in evaluation"
        for expert in range(cases.EXPERTS):
            chose = [token for token in range(8) if every[token, expert]]
            best = sorted(chose, key=lambda token: -float(plain[token, expert]))[:2]  # 8 tokens x 2 / 8 experts
            assert taken[:, expert].nonzero().flatten().tolist() == sorted(best)
        torch.testing.assert_close(probs, plain * taken)
        assert isinstance(router, PackRouter) and int(router.take_tally()[-1]) == 16 - int(taken.sum())


@pytest.mark.long
def test_shared_packs_equal_one_process(tmp_path: Path) -> None:
    check(tmp_path, SHARED)


@pytest.mark.long
def test_dropout_before_adapters_of_experts_is_drawn_again(tmp_path: Path) -> None:
    """Where layers are recomputed; tokens of an expert are as many each time, and drawn from a stream of its own."""
    dropped = {"lora": {**ADAPTERS["lora"], "dropout": 0.3}}
    folder = str(tmp_path / "run")
    (plain,) = ranks.run(cases.train, folder, cases.MIXED, ADAPTERS)
    jobs = [
        (folder, cases.MIXED, {"parallel": TP2 | EP2 | more, **dropped})
        for more in ({}, {"recompute_granularity": "full"})
    ]
    for kept, again in ranks.run(cases.train_all, jobs, world=2):
        for key in ("loss", "grad_norm"):
            assert again[key] == pytest.approx(kept[key], rel=EQUAL)
        assert kept["loss"][0] != pytest.approx(plain["loss"][0], rel=1e-4)
