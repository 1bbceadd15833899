"""Adapters of experts in PEFT's format: the same function there, gradients of the weights' own, the same bits back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
from family_cases import _TEXT, IMAGE, clip_vision, made
from glm4v_models import glm4v_moe, save
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from qwen3_vl_models import qwen3_vl_moe, save_as_on_the_hub
from safetensors.torch import load_file, save_file
from test_peft import TOLERANCE, adapted, bits, broken_config, close, convert, every_name
from text_cases import deepseek_v2_grouped, glm4_moe
from torch import Tensor
from transformers import (
    DeepseekV2ForCausalLM,
    Glm4MoeForCausalLM,
    Glm4vMoeForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeForConditionalGeneration,
)

from megavlm.checkpoint.distributed import load
from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.data.media import arrange, plan_of
from megavlm.evaluation.parity import Sample, _batch
from megavlm.families.presets import expand_presets
from megavlm.models.build import build_model, unwrap
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.state import process_groups

EXPERTS, LAYERS, RANK, SCALE = 4, _TEXT["num_hidden_layers"], 4, 6 / 4
VOCAB = _TEXT["vocab_size"]
MODELS = {
    "mixtral": (
        lambda: made(MixtralForCausalLM, MixtralConfig(**_TEXT, num_local_experts=EXPERTS, num_experts_per_tok=2)),
        ["q_proj", "w1", "w2", "w3"],
    ),
    "qwen3_moe": (
        lambda: made(
            Qwen3MoeForCausalLM,
            Qwen3MoeConfig(
                **_TEXT, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
            ),
        ),
        ["experts.gate_proj", "up_proj", "down_proj"],
    ),
}
NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3"), "w2"),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj"), "down_proj"),
}
"""Of the module of the experts, of gate and up, and of down, in published checkpoints."""


def text() -> Sample:
    ids = torch.randint(3, VOCAB, (31,), generator=torch.Generator().manual_seed(8))
    return Sample("text", ids, torch.zeros(0, 3, 0, 0), [], None, {})


def weighed(logits_SV: Tensor) -> Tensor:
    """Return a number that depends on all logits."""
    return (logits_SV * torch.randn(logits_SV.shape, generator=torch.Generator().manual_seed(9))).sum()


def logits_of(checkpoint: Path) -> tuple[Tensor, VisionLanguageModel]:
    """Return the logits of a checkpoint, and its model, in which ``weighed`` has gone backward."""
    recipe, one = load_recipe(checkpoint / "recipe.yaml", [], expand_presets), text()
    with process_groups(recipe.parallel, 1):
        model = unwrap(build_model(recipe, IMAGE)[0]).eval()
        load(checkpoint, modules=[model])
        batch = _batch(one, arrange(plan_of(recipe.model), one.layouts), recipe, model)
        logits = model(batch.tokens, batch.position_ids, batch.packed_seq_params, images=batch.images)[0, :, :VOCAB]
        weighed(logits).backward()
        return logits.detach(), model


def theirs(model: torch.nn.Module) -> Tensor:
    found: Tensor = model(input_ids=text().ids[None]).logits[0]
    return found


def base_of(alone: PreTrainedModel, root: Path) -> Path:
    """Compose a model of ``alone`` and a tower."""
    alone.save_pretrained(root / "llm")
    clip_vision().save_pretrained(root / "clip")
    convert("hf-to-megatron", "--language", root / "llm", "--vision", root / "clip", "--out", root / "base")
    return root / "base"


@pytest.mark.family("mixtral", "qwen3_moe")
@pytest.mark.parametrize("name", MODELS)
def test_peft_and_the_merged_weights_compute_the_same(name: str, tmp_path: Path) -> None:
    make, targets = MODELS[name]
    base = base_of(make(), tmp_path)
    saved = adapted(base, tmp_path / "run", targets, [])
    expected, model = logits_of(saved)
    with torch.no_grad():
        assert (expected - theirs(made_again(name, tmp_path / "llm"))).abs().max() > 0.01  # the adapters matter
        convert("megatron-to-hf", "--megatron", saved, "--adapter", "--family", name, "--out", tmp_path / "peft")
        both = PeftModel.from_pretrained(made_again(name, tmp_path / "llm"), tmp_path / "peft").eval()
        close(theirs(both), expected)

    convert("megatron-to-hf", "--megatron", saved, "--family", name, "--out", tmp_path / "whole")
    whole = made_again(name, tmp_path / "whole")
    logits = theirs(whole)
    close(logits, expected)
    weighed(logits).backward()
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len([key for key in tensors if ".experts." in key]) == LAYERS * EXPERTS * 3 * 2
    for layer in range(LAYERS):
        check_gradients(name, layer, whole, model, tensors)

    convert("merge", "--megatron", saved, "--out", tmp_path / "merged")
    close(logits_of(tmp_path / "merged")[0], expected)
    convert("megatron-to-hf", "--megatron", saved, "--adapter", "--out", tmp_path / "inside")
    convert("hf-to-megatron", "--adapter", tmp_path / "inside", "--base", base, "--out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(saved)


def made_again(name: str, directory: Path) -> PreTrainedModel:
    kind = MixtralForCausalLM if name == "mixtral" else Qwen3MoeForCausalLM
    found: PreTrainedModel = kind.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    return found


def check_gradients(
    name: str, layer: int, whole: PreTrainedModel, model: VisionLanguageModel, tensors: dict[str, Tensor]
) -> None:
    """Check each expert's A and B by the gradient of the weight that they add to: of W + s B A they follow from it."""
    folder, upper, lower = NAMES[name]
    stacked = whole.model.layers[layer].mlp.experts
    for number, expert in enumerate(model.language.decoder.layers[layer].mlp.experts.local_experts):
        prefix = f"base_model.model.model.layers.{layer}.{folder}.experts.{number}"
        gate_up = zip(upper, stacked.gate_up_proj.grad[number].chunk(2), strict=True)
        for linear, parts in (
            (expert.linear_fc1, gate_up),
            (expert.linear_fc2, [(lower, stacked.down_proj.grad[number])]),
        ):
            wanted_a, wanted_b = [], []
            for part, grad in parts:
                a, b = (tensors[f"{prefix}.{part}.lora_{kind}.weight"] for kind in "AB")
                wanted_a.append(SCALE * b.T @ grad)
                wanted_b.append(SCALE * grad @ a.T)
            for got, wanted in ((linear.lora_a.grad, wanted_a), (linear.lora_b.grad, wanted_b)):
                assert got is not None and float(got.abs().max()) > 0
                close(got, torch.cat(wanted))


class Bare(torch.nn.Module):
    """A model whose kind PEFT does not know: it takes all gate, up and down of GLM-4.5 for experts'."""

    def __init__(self, whole: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.lm_head = whole.model, whole.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.lm_head(self.model(input_ids=ids).last_hidden_state)
        return logits


@pytest.mark.family("glm4_moe")
def test_shared_experts_in_peft_and_merged(tmp_path: Path) -> None:
    """Of GLM-4.5, whose first layer has an MLP: of attention and shared experts, which are modules."""
    base = base_of(glm4_moe(), tmp_path)
    targets = ["q_proj", *(f"shared_experts.{name}_proj" for name in ("gate", "up", "down"))]
    saved = adapted(base, tmp_path / "run", targets, [])
    expected, model = logits_of(saved)

    def read(directory: Path) -> PreTrainedModel:
        return Glm4MoeForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()

    convert("megatron-to-hf", "--megatron", saved, "--adapter", "--family", "glm4_moe", "--out", tmp_path / "peft")
    settings = LoraConfig.from_pretrained(tmp_path / "peft")
    settings.task_type, bare = None, Bare(read(tmp_path / "llm"))
    both = PeftModel.from_pretrained(bare, tmp_path / "peft", config=settings, is_trainable=True).eval()
    logits = both(text().ids[None])[0]
    assert (logits - theirs(read(tmp_path / "llm"))).abs().max() > 0.01  # the adapters matter
    close(logits, expected)
    weighed(logits).backward()
    own, layer = dict(both.named_parameters()), 1
    shared = model.language.decoder.layers[layer].mlp.shared_experts
    for linear, names in ((shared.linear_fc1, ("gate_proj", "up_proj")), (shared.linear_fc2, ("down_proj",))):
        for parameter, kind in ((linear.lora_a, "A"), (linear.lora_b, "B")):
            prefix = f"base_model.model.model.layers.{layer}.mlp.shared_experts"
            wanted = torch.cat([own[f"{prefix}.{name}.lora_{kind}.default.weight"].grad for name in names])
            assert float(wanted.abs().max()) > 0
            close(parameter.grad, wanted)

    convert("megatron-to-hf", "--megatron", saved, "--family", "glm4_moe", "--out", tmp_path / "whole")
    close(theirs(read(tmp_path / "whole")), expected)
    convert("merge", "--megatron", saved, "--out", tmp_path / "merged")
    close(logits_of(tmp_path / "merged")[0], expected)


@pytest.mark.family("deepseek_v2")
def test_latent_attention_in_peft_and_merged(tmp_path: Path) -> None:
    """Of DeepSeek-V2: of what makes queries, keys and values of latents, and of what stands behind attention."""
    base = base_of(deepseek_v2_grouped(), tmp_path)
    targets = ["q_b_proj", "kv_b_proj", "o_proj"]
    saved = adapted(base, tmp_path / "run", targets, [])
    expected, model = logits_of(saved)
    convert("megatron-to-hf", "--megatron", saved, "--adapter", "--family", "deepseek_v2", "--out", tmp_path / "peft")
    settings = LoraConfig.from_pretrained(tmp_path / "peft")
    settings.task_type = None
    there = DeepseekV2ForCausalLM.from_pretrained(tmp_path / "llm", attn_implementation="eager", dtype=torch.float32)
    both = PeftModel.from_pretrained(Bare(there.eval()), tmp_path / "peft", config=settings, is_trainable=True).eval()
    logits = both(text().ids[None])[0]
    close(logits, expected)
    weighed(logits).backward()
    own, attention = dict(both.named_parameters()), model.language.decoder.layers[1].self_attention
    linears = (attention.linear_q_up_proj, attention.linear_kv_up_proj, attention.linear_proj)
    for linear, name in zip(linears, targets, strict=True):
        for parameter, kind in ((linear.lora_a, "A"), (linear.lora_b, "B")):
            wanted = own[f"base_model.model.model.layers.1.self_attn.{name}.lora_{kind}.default.weight"].grad
            assert float(wanted.abs().max()) > 0
            close(parameter.grad, wanted)
    convert("merge", "--megatron", saved, "--out", tmp_path / "merged")
    close(logits_of(tmp_path / "merged")[0], expected)


@pytest.mark.family("glm4v_moe")
def test_adapters_of_all_kinds_of_mlp_there_and_back(tmp_path: Path) -> None:
    """Of GLM-4.5V: of its first layer's MLP, of experts and of shared ones."""
    base = tmp_path / "base"
    convert("hf-to-megatron", "--hf", save(glm4v_moe(), tmp_path / "hf"), "--out", base)
    saved = adapted(base, tmp_path / "run", ["all-linear"], [])
    convert("megatron-to-hf", "--megatron", saved, "--adapter", "--out", tmp_path / "peft")
    names = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for middle in (".mlp.gate_proj.", ".mlp.shared_experts.down_proj.", ".mlp.experts.3.up_proj."):
        assert any(middle in name for name in names)
    convert("hf-to-megatron", "--adapter", tmp_path / "peft", "--base", base, "--out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(saved)


@pytest.mark.family("mixtral")
def test_some_of_an_experts_layers(tmp_path: Path) -> None:
    """Of up alone, which PEFT does not take for Transformers 5's experts: the sum is checked by the file's numbers."""
    base = base_of(MODELS["mixtral"][0](), tmp_path)
    saved = adapted(base, tmp_path / "run", ["experts.up_proj"], [])
    convert("megatron-to-hf", "--megatron", saved, "--adapter", "--out", tmp_path / "peft")
    convert("megatron-to-hf", "--megatron", saved, "--family", "mixtral", "--out", tmp_path / "whole")
    tensors, after = (
        load_file(tmp_path / "peft" / "adapter_model.safetensors"),
        load_file(tmp_path / "whole" / "model.safetensors"),
    )
    assert len(tensors) == LAYERS * EXPERTS * 2 and all(".w3." in key for key in tensors)
    before = made_again("mixtral", tmp_path / "llm")
    for layer in range(LAYERS):
        for number in range(EXPERTS):
            name = f"layers.{layer}.block_sparse_moe.experts.{number}.w3"
            a, b = (
                tensors[next(key for key in tensors if key.endswith(f"{name}.lora_{kind}.weight"))] for kind in "AB"
            )
            up = before.model.layers[layer].mlp.experts.gate_up_proj[number].chunk(2)[1].detach()
            close(after[f"model.{name}.weight"], up + SCALE * b @ a)
    convert("hf-to-megatron", "--adapter", tmp_path / "peft", "--base", base, "--out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(saved)


UP_ALONE = ["q_proj", "experts.up_proj"]


def peft_on(model: PreTrainedModel, directory: Path) -> Tensor:
    """Return the logits that PEFT's own wrappers make of an adapter, every tensor of which must have a place."""
    with torch.no_grad():
        both = PeftModel.from_pretrained(model.eval(), directory).eval()
        held = get_peft_model_state_dict(both)
        there = load_file(directory / "adapter_model.safetensors")
        assert held.keys() == there.keys() and all(torch.equal(held[key], there[key]) for key in held)
        return theirs(both)


@pytest.mark.family("glm4v_moe")
def test_experts_of_glm_beside_its_shared_ones(tmp_path: Path) -> None:
    """Of GLM-4.5V, whose experts lie apart as published: PEFT's parameters where asked for."""
    base, hf, peft = (tmp_path / name for name in ("base", "hf", "peft"))
    convert("hf-to-megatron", "--hf", save(glm4v_moe(), hf), "--out", base)
    targets = ["q_proj", "experts.gate_proj", "experts.up_proj", "experts.down_proj"]
    saved = adapted(base, tmp_path / "run", targets, [])
    convert("megatron-to-hf", "--megatron", saved, "--adapter", "--stacked-experts", "--out", peft)
    plain = Glm4vMoeForConditionalGeneration.from_pretrained(hf, attn_implementation="eager", dtype=torch.float32)
    close(peft_on(plain, peft)[:, :VOCAB], logits_of(saved)[0])
    convert("hf-to-megatron", "--adapter", peft, "--base", base, "--out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(saved)


@pytest.mark.family("qwen3_vl_moe")
@pytest.mark.parametrize("targets", [["q_proj", "gate_proj", "up_proj", "down_proj"], UP_ALONE, ["down_proj"]])
def test_experts_in_one_tensor(targets: list[str], tmp_path: Path) -> None:
    """Of Qwen3-VL-MoE: PEFT's ``target_parameters``; at one process and two ranks, merged, and the same bits back."""
    base, hf, peft, back = (tmp_path / name for name in ("base", "hf", "peft", "back"))
    convert("hf-to-megatron", "--hf", save_as_on_the_hub(qwen3_vl_moe(), hf), "--out", base)
    saved = adapted(base, tmp_path / "run", targets, [])
    expected = logits_of(saved)[0]
    plain = Qwen3VLMoeForConditionalGeneration.from_pretrained(hf, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        assert (expected - theirs(plain)[:, :VOCAB]).abs().max() > 0.01  # the adapters matter
    convert("megatron-to-hf", "--megatron", saved, "--adapter", "--out", peft)
    logits = peft_on(plain, peft)
    close(logits[:, :VOCAB], expected)
    convert("hf-to-megatron", "--adapter", peft, "--base", base, "--out", back)
    assert bits(back) == bits(saved)
    if len(targets) == 4:
        held_at_two_ranks(back, logits, tmp_path)
        convert("megatron-to-hf", "--megatron", saved, "--out", tmp_path / "whole")
        before, after = (load_file(path / "model.safetensors") for path in (hf, tmp_path / "whole"))
        changed = {name.rpartition("experts.")[2] for name in before if not torch.equal(before[name], after[name])}
        assert {"gate_up_proj", "down_proj"} < changed


def held_at_two_ranks(checkpoint: Path, logits_SV: Tensor, root: Path) -> None:
    """Hold a checkpoint against PEFT's logits at EP 2 and at TP 2."""
    save_file({"s0.input_ids": text().ids, "s0.logits": logits_SV.contiguous()}, root / "reference.safetensors")
    words = ["convert", "verify", "--megatron", checkpoint, "--reference", root / "reference.safetensors"]
    words += ["--tolerance", TOLERANCE * float(logits_SV.abs().max()), "--set", "training.precision=fp32"]
    for layout in (["expert_model_parallel_size=2"], ["tensor_model_parallel_size=2", "sequence_parallel=true"]):
        ranks.megavlm(list(map(str, [*words, *(f"parallel.{key}" for key in layout)])), world=2)


@pytest.mark.family("mixtral", "qwen3_moe")
@pytest.mark.parametrize("name", MODELS)
def test_adapters_that_peft_trained_on_one_tensor(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On Transformers 5's experts: gate and up share an A. They are read as that; and up alone goes out so."""
    base = base_of(MODELS[name][0](), tmp_path)
    torch.manual_seed(6)
    parameters = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    settings = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False
    )
    trained = get_peft_model(made_again(name, tmp_path / "llm"), settings)
    trained.save_pretrained(tmp_path / "peft")
    inside = ("base_model.model.model.", "base_model.model.model.language_model.")
    every_name(tmp_path / "peft", *inside)
    convert("hf-to-megatron", "--adapter", tmp_path / "peft", "--base", base, "--out", tmp_path / "in")
    close(logits_of(tmp_path / "in")[0], theirs(trained.eval()).detach())

    # At another rank than the other layers', gate and up cannot be told apart.
    changes: dict[str, dict[str, float]] = {"rank_pattern": {"gate_up_proj": 8}, "alpha_pattern": {"gate_up_proj": 12}}
    more = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False, **changes
    )
    get_peft_model(made_again(name, tmp_path / "llm"), more).save_pretrained(tmp_path / "mixed")
    every_name(tmp_path / "mixed", *inside)
    words = ["convert", "hf-to-megatron", "--adapter", tmp_path / "mixed", "--base", base, "--out", tmp_path / "no"]
    assert main(list(map(str, words))) == 2
    assert "lora_B.weight has rank 8 (rank_pattern) and is not block-diagonal" in capsys.readouterr().err

    saved = adapted(base, tmp_path / "run", UP_ALONE, [])
    out = ["--megatron", saved, "--adapter", "--stacked-experts", "--family", name, "--out", tmp_path / "up"]
    convert("megatron-to-hf", *out)
    close(peft_on(made_again(name, tmp_path / "llm"), tmp_path / "up"), logits_of(saved)[0])
    every_name(tmp_path / "up", *inside)
    convert("hf-to-megatron", "--adapter", tmp_path / "up", "--base", base, "--out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(saved)


WRONG = {
    "one parameter too many": (
        lambda d: broken_config(d, target_parameters=[]),
        "target_parameters of the configuration names neither",
    ),
    "another number of experts": (
        lambda d: every_tensor(d, lambda key, v: v[:-4] if key.endswith("experts.lora_A.weight") else v),
        "of 4 experts with adapters of rank 4 it has 16 rows",
    ),
    "twice the rank, not twice the alpha": (
        lambda d: broken_config(d, rank_pattern={"gate_up_proj": 8}),
        "rank_pattern is {'gate_up_proj': 8}, which is not supported",
    ),
    "B is gone": (
        lambda d: every_tensor(d, lambda key, v: None if key.endswith("experts.lora_B.weight") else v),
        "experts.lora_B.weight; restore the file",
    ),
    "no names": (lambda d: broken_config(d, target_parameters="all"), "target_parameters is 'all'"),
}


def every_tensor(directory: Path, change: Callable[[str, Tensor], Tensor | None]) -> None:
    path = directory / "adapter_model.safetensors"
    after = {key: change(key, value) for key, value in load_file(path).items()}
    save_file({key: value.contiguous() for key, value in after.items() if value is not None}, path)


@pytest.mark.family("qwen3_vl_moe")
def test_other_adapters_of_one_tensor_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    convert("hf-to-megatron", "--hf", save_as_on_the_hub(qwen3_vl_moe(), tmp_path / "hf"), "--out", base)
    saved = adapted(base, tmp_path / "run", ["down_proj"], ["lora.dropout=0.1"])
    convert("megatron-to-hf", "--megatron", saved, "--adapter", "--out", tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["lora_dropout"] == 0
    for number, (spoil, message) in enumerate(WRONG.values()):
        peft = Path(shutil.copytree(tmp_path / "peft", tmp_path / str(number)))
        spoil(peft)
        words = ["convert", "hf-to-megatron", "--adapter", peft, "--base", base, "--out", tmp_path / "out"]
        assert main(list(map(str, words))) == 2
        assert message in capsys.readouterr().err
    saved = adapted(base, tmp_path / "other", ["q_proj"], [])
    words = ["convert", "megatron-to-hf", "--megatron", saved, "--out", tmp_path / "out", "--stacked-experts"]
    for more, message in (([], "goes with --adapter"), (["--adapter"], "has no adapters of experts")):
        assert main([*map(str, words), *more]) == 2
        assert f"--stacked-experts: {message}" in capsys.readouterr().err.replace(f"{saved} ", "")
