"""Adapters of experts in PEFT's format: the same function there, gradients of the weights' own, the same bits back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_cases import _TEXT, IMAGE, clip_vision, made
from glm4v_models import glm4v_moe, save
from peft import LoraConfig, PeftModel
from qwen3_vl_models import qwen3_vl_moe, save_as_on_the_hub
from safetensors.torch import load_file
from test_peft import adapted, bits, close, convert
from text_cases import deepseek_v2_grouped, glm4_moe
from torch import Tensor
from transformers import (
    DeepseekV2ForCausalLM,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
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


@pytest.mark.family("qwen3_vl_moe")
def test_experts_in_one_tensor_have_no_adapter_of_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole weights go out, and say the same."""
    base = tmp_path / "base"
    convert("hf-to-megatron", "--hf", save_as_on_the_hub(qwen3_vl_moe(), tmp_path / "hf"), "--out", base)
    saved = adapted(base, tmp_path / "run", ["gate_proj", "up_proj"], [])
    words = ["convert", "megatron-to-hf", "--megatron", str(saved), "--out", str(tmp_path / "out")]
    assert main([*words, "--adapter"]) == 2
    assert "keeps all experts of a layer in one tensor" in capsys.readouterr().err
    assert main(words) == 0
    before, after = (
        {key: value for file in path.glob("*.safetensors") for key, value in load_file(file).items()}
        for path in (tmp_path / "hf", tmp_path / "out")
    )
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.endswith("experts.gate_up_proj") for key in changed)
