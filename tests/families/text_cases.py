"""Small language models, one row per kind, and what ranks do with each: loss, the gradient of every parameter, answers.

Transformers' class is the reference, with random weights; of MiniCPM and InternLM2 it is ``text_reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from family_cases import _TEXT, llama, made, qwen2, qwen3  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from text_reference import InternLM2, MiniCPM, randomised  # noqa: E402
from tiny import IMAGE_SIZE, tiny_recipe  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from megavlm.checkpoint.hf.shapes import alone, family_slots, make_rules  # noqa: E402
from megavlm.checkpoint.placement import expert_biases  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.batch import make_pack  # noqa: E402
from megavlm.data.device_batch import make_batch  # noqa: E402
from megavlm.families.known import FAMILIES  # noqa: E402
from megavlm.families.presets import load_presets  # noqa: E402
from megavlm.inference.generate import generate  # noqa: E402
from megavlm.inference.prompt import Prompt  # noqa: E402
from megavlm.parallel.device import local_device  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import run_batches  # noqa: E402
from megavlm.weights.source import Source  # noqa: E402

LENGTHS, PACK, VOCAB, NEW = (23, 14), 40, 120, 6
LOSS, GRADIENTS = 1e-5, 5e-5


def phi() -> Any:
    """Phi-2: rotary positions on 0.4 of a head, of which that is whole pairs."""
    keys = {**_TEXT, "num_key_value_heads": None, "hidden_size": 80, "partial_rotary_factor": 0.4}
    return made(PhiForCausalLM, PhiConfig(**keys))


def phi_normed() -> Any:
    """Phi with its option of norms on queries and keys, and grouped heads."""
    return made(PhiForCausalLM, PhiConfig(**_TEXT, qk_layernorm=True))


def phi3() -> Any:
    """Phi-3, whose window is shorter than the samples."""
    return made(Phi3ForCausalLM, Phi3Config(**_TEXT, sliding_window=9, pad_token_id=0, eos_token_id=1))


def gemma() -> Any:
    """Gemma-2B: one key/value head, heads wider than hidden_size / heads."""
    return made(GemmaForCausalLM, GemmaConfig(**{**_TEXT, "num_key_value_heads": 1}, head_dim=32))


def gemma3() -> Any:
    """Gemma 3: windows but in every third layer, which are at other places in each stage; stretched positions there."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    keys = {"head_dim": 32, "sliding_window": 8, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24}
    return made(Gemma3ForCausalLM, Gemma3TextConfig(**_TEXT, **keys, rope_parameters=rope))


def glm4() -> Any:
    """GLM-4."""
    return made(Glm4ForCausalLM, Glm4Config(**_TEXT, head_dim=16, pad_token_id=0, eos_token_id=1))


def stablelm() -> Any:
    """StableLM-2."""
    return made(StableLmForCausalLM, StableLmConfig(**_TEXT, use_qkv_bias=True))


def stablelm_parallel() -> Any:
    """StableLM with attention and MLP side by side, and no biases."""
    return made(StableLmForCausalLM, StableLmConfig(**_TEXT, use_parallel_residual=True, partial_rotary_factor=0.5))


def mistral() -> Any:
    """Mistral-7B v0.1, whose window is shorter than the samples."""
    return made(MistralForCausalLM, MistralConfig(**_TEXT, sliding_window=8, head_dim=16))


_PLAIN = {**_TEXT, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "torch_dtype": "float32"}


def minicpm() -> Any:
    """MiniCPM-2B."""
    keys = {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "rope_scaling": None}
    keys |= {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16, "tie_word_embeddings": True}
    return randomised(MiniCPM({**_PLAIN, **keys, "num_key_value_heads": 4}))


def internlm2() -> Any:
    """InternLM2.5, with the scaling that only longer segments would see."""
    keys = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
    keys |= {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "tie_word_embeddings": False}
    return randomised(InternLM2({**_PLAIN, **keys}))


_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


def qwen3_moe() -> Any:
    """Qwen3-MoE with an MLP in its second layer, and experts narrower than that."""
    own = {"num_experts": 4, "mlp_only_layers": [1], "norm_topk_prob": True, "head_dim": 32}
    return made(Qwen3MoeForCausalLM, Qwen3MoeConfig(**_TEXT, **_EXPERTS, **own))


def qwen3_moe_unnormed() -> Any:
    """Experts in every second layer, whose scores do not add up to 1."""
    return made(Qwen3MoeForCausalLM, Qwen3MoeConfig(**_TEXT, **_EXPERTS, num_experts=6, decoder_sparse_step=2))


def mixtral() -> Any:
    """Mixtral."""
    return made(MixtralForCausalLM, MixtralConfig(**_TEXT, num_local_experts=4, num_experts_per_tok=2))


def glm4_moe() -> Any:
    """GLM-4.5 with norms on queries and keys, an MLP in its first layer, two experts of one of two groups."""
    own = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
    own |= {"first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True}
    model = made(Glm4MoeForCausalLM, Glm4MoeConfig(**_TEXT, **_EXPERTS, **own, head_dim=32))
    with torch.no_grad():
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # 0 at first
                bias.copy_(torch.rand_like(bias) * 0.2)
    return model


_LATENT = {"kv_lora_rank": 40, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20, "n_shared_experts": 2}
# With a seed with which each expert gets a token.
_LATENT |= {"num_key_value_heads": 4, "first_k_dense_replace": 1}


def deepseek_v2() -> Any:
    """DeepSeek-V2-Lite: queries of the stream; the best two of four experts, whose scores do not add up to 1."""
    own = {"q_lora_rank": None, "n_routed_experts": 4, "routed_scaling_factor": 2.5}
    return made(DeepseekV2ForCausalLM, DeepseekV2Config(**{**_TEXT, **_EXPERTS, **_LATENT, **own}), 1)


def deepseek_v2_grouped() -> Any:
    """DeepSeek-V2: queries of a latent; the best of each of the two best of three groups of experts."""
    own = {"q_lora_rank": 24, "n_routed_experts": 6, "n_group": 3, "topk_group": 2}
    own |= {"topk_method": "group_limited_greedy"}
    return made(DeepseekV2ForCausalLM, DeepseekV2Config(**{**_TEXT, **_EXPERTS, **_LATENT, **own}), 2)


def mamba() -> Any:
    """Mamba: no attention and no MLP; a rank of the step sizes that two do not divide."""
    keys = {"hidden_size": 64, "num_hidden_layers": 4, "state_size": 8, "time_step_rank": 5, "vocab_size": VOCAB}
    return made(MambaForCausalLM, MambaConfig(**keys, pad_token_id=0, eos_token_id=1))


@dataclass(frozen=True)
class Kind:
    """A row: the kind's preset, its model, and the family that its checkpoints are of."""

    preset: str
    make: Callable[[], Any]
    family: str


ROWS: dict[str, Kind] = {
    "llama": Kind("llama", llama, "llama"),
    "qwen2": Kind("qwen2", qwen2, "llama"),
    "qwen3": Kind("qwen3", qwen3, "llama"),
    "mistral": Kind("mistral", mistral, "llama"),
    "phi": Kind("phi", phi, "phi"),
    "phi_normed": Kind("phi", phi_normed, "phi"),
    "phi3": Kind("phi3", phi3, "phi3"),
    "gemma": Kind("gemma", gemma, "gemma"),
    "gemma3_text": Kind("gemma3_text", gemma3, "gemma3_text"),
    "glm4": Kind("glm4", glm4, "glm4"),
    "stablelm": Kind("stablelm", stablelm, "stablelm"),
    "stablelm_parallel": Kind("stablelm", stablelm_parallel, "stablelm"),
    "minicpm": Kind("minicpm", minicpm, "minicpm"),
    "internlm2": Kind("internlm2", internlm2, "internlm2"),
    "mamba": Kind("mamba", mamba, "mamba"),
    "qwen3_moe": Kind("qwen3_moe", qwen3_moe, "qwen3_moe"),
    "qwen3_moe_unnormed": Kind("qwen3_moe", qwen3_moe_unnormed, "qwen3_moe"),
    "mixtral": Kind("mixtral", mixtral, "mixtral"),
    "glm4_moe": Kind("glm4_moe", glm4_moe, "glm4_moe"),
    "deepseek_v2": Kind("deepseek_v2", deepseek_v2, "deepseek_v2"),
    "deepseek_v2_grouped": Kind("deepseek_v2", deepseek_v2_grouped, "deepseek_v2"),
}
EXPERTS = ("qwen3_moe", "qwen3_moe_unnormed", "mixtral", "glm4_moe", "deepseek_v2", "deepseek_v2_grouped")
"""Rows with experts."""
ELSEWHERE = {"qwen", "t5"}
"""Kinds that other tests hold: Qwen v1 (tests/models/test_reference.py), T5 (test_t5.py)."""
OTHERS = {"mamba"}
"""Kinds that are of another architecture than the decoders', and no half of a composed model."""


def recipe_of(branch: dict[str, Any], layout: dict[str, Any]) -> Recipe:
    """Return the recipe of a model with this language branch, of which the rest is frozen."""
    small = {"image_size": IMAGE_SIZE, "hidden_size": 48, "num_layers": 2, "ffn_hidden_size": 96}
    model = {
        "preset": "tiny",
        "vision": {**small, "num_attention_heads": 4, "positional_grid": 2},
        "connector": {"num_queries": 4, "head_dim": 16},
        "language": branch,
    }
    return tiny_recipe(
        model=model,
        modules={"vision": {"freeze": True}, "connector": {"freeze": True}},
        parallel={"use_distributed_optimizer": False, **layout},
    )


def language_branch(name: str, directory: Path) -> dict[str, Any]:
    """Return the branch that the row's family reads from its checkpoint."""
    load_presets()
    return dict(FAMILIES[ROWS[name].family].branches(Source(directory))["language"])


def write_reference(name: str, directory: Path, path: Path) -> None:
    """Make the row's checkpoint in ``directory``, and write what its model computes, by the canonical names."""
    model = ROWS[name].make()
    model.save_pretrained(directory)
    family, model_config = FAMILIES[ROWS[name].family], recipe_of(language_branch(name, directory), {}).model
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(0, VOCAB - 1, (length,), generator=generator) for length in LENGTHS]
    logits = [model(input_ids=one[None]).logits[0] for one in ids]
    losses = [F.cross_entropy(a[:-1], b[1:], reduction="sum") for a, b in zip(logits, ids, strict=True)]
    loss = sum(losses) / sum(length - 1 for length in LENGTHS)
    loss.backward()
    found = {"ids": torch.cat(ids), "loss": loss.detach().reshape(1), "logits": torch.cat(logits).detach()}
    for i, one in enumerate((ids[0], ids[1], ids[0][:5])):
        whole = model.generate(input_ids=one[None], attention_mask=torch.ones(1, len(one)), do_sample=False,
                               max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)  # fmt: skip
        found[f"prompt.{i}"], found[f"answer.{i}"] = one, whole[0, len(one) :]
    weights, gradients = _as_saved(model, directory)
    with alone():
        rules = make_rules(family, model_config, next(iter(family.styles)), family_slots(family, model_config))
    for rule in rules:
        if rule.row.ours[0].endswith(".expert_bias"):  # which learns no gradient
            (key,), (name,) = rule.row.ours, rule.row.theirs
            weights.pop(name, None), gradients.pop(name, None)
            found[f"bias.{key}"] = model.get_buffer(name).clone()
            continue
        for kind, tensors in (("weight", weights), ("gradient", gradients)):
            own = [tensors.pop(key) for key in rule.row.theirs]
            for key, value in zip(rule.row.ours, rule.to_ours(own), strict=True):
                assert value.abs().max() > 0, key
                found[f"{kind}.{key}"] = value.detach()
    assert not weights or list(weights) == ["lm_head.weight"], weights.keys()  # tied
    save_file({key: value.contiguous().clone() for key, value in found.items()}, path)


def _as_saved(model: Any, directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights and gradients by the names of a checkpoint; Transformers holds experts under others."""
    theirs = dict(model.named_parameters())
    gradients = {key: parameter.grad for key, parameter in theirs.items()}
    if not any(".experts." in key for key in theirs):
        return theirs, gradients
    weights = Source(directory)
    with torch.no_grad():
        for key, parameter in theirs.items():
            parameter.copy_(gradients[key])
    model.save_pretrained(directory / "gradients")
    found = Source(directory / "gradients")
    return {key: weights.get(key) for key in weights.tensors}, {key: found.get(key) for key in found.tensors}


def compare_all(branches: dict[str, dict[str, Any]], folder: str, layout: dict[str, Any]) -> dict[str, list[str]]:
    """Compare every row; return the parameters that this rank has compared."""
    first = recipe_of(next(iter(branches.values())), layout)
    with process_groups(first.parallel, first.training.seed):
        return {
            name: compare(recipe_of(branch, layout), Source(Path(folder) / f"{name}.safetensors"), name)
            for name, branch in branches.items()
        }


def compare(recipe: Recipe, wanted: Source, name: str) -> list[str]:
    """Compare the loss of a pack of two segments, all gradients, logits where one process has them, and answers."""
    training = build_training(recipe, VOCAB - 1)
    parameters = {key: p for module in training.modules for key, p in _language(module)}
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(shard(wanted.get(f"weight.{key}"), parameter, key))
        for module in training.modules:
            module.language.eval()
            first = module.decoder.layers[0].layer_number - 1
            for key, bias in expert_biases(module):
                bias.copy_(wanted.get(f"bias.{_of_whole(key, first)}"))
    ids = list(wanted.get("ids").split(LENGTHS))
    batch = make_batch(make_pack(ids, PACK, labels=ids), None, local_device())
    few = (
        2 if len(training.chunks) > 1 else 1
    )  # the interleaved schedule takes no fewer; of equal ones the mean is one's
    report = run_batches(training.chunks, [batch] * few, num_sources=1)
    loss, expected = float(report[0, 0] / report[0, 1]), float(wanted.get("loss"))
    assert abs(loss - expected) <= LOSS * expected, (name, loss, expected)
    scale = max(float(wanted.get(key).abs().max()) for key in wanted.tensors if key.startswith("gradient."))
    for key, parameter in parameters.items():
        off = float((parameter.main_grad - shard(wanted.get(f"gradient.{key}"), parameter, key)).abs().max())
        assert off <= GRADIENTS * scale, (name, key, off / scale)
    layout = recipe.parallel
    if layout.tensor_model_parallel_size == layout.pipeline_model_parallel_size == 1:
        with torch.no_grad():
            logits = training.modules[0](batch.tokens, batch.position_ids, batch.packed_seq_params)[0]
        there = wanted.get("logits")
        assert (logits[: len(there), :VOCAB] - there).abs().max() <= 2e-5 * there.abs().max(), name
    prompts = [Prompt(wanted.get(f"prompt.{i}").numpy(), torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE)) for i in range(3)]
    answers = generate(
        training.chunks, prompts, max_new_tokens=NEW, stop_ids=[], vocab_size=VOCAB, pack_length=2 * PACK
    )
    assert answers == [wanted.get(f"answer.{i}").tolist() for i in range(3)], name
    return sorted(parameters)


def _language(module: Any) -> list[tuple[str, nn.Parameter]]:
    """Return a chunk's language parameters, with the numbers that layers have in the whole model."""
    first, found = module.decoder.layers[0].layer_number - 1, []
    for key, parameter in module.named_parameters():
        key = _whole_expert(_of_whole(key, first), module)
        tied = key == "language.output_layer.weight" and module.share_embeddings_and_output_weights
        if key.startswith("language."):
            found.append(("language.embedding.word_embeddings.weight" if tied else key, parameter))
    return found


def _of_whole(key: str, first: int) -> str:
    """Return a name with the number that its layer has in the whole model; ``first``: of this chunk's first one."""
    prefix = "language.decoder.layers."
    if not key.startswith(prefix):
        return key
    number, _, rest = key.removeprefix(prefix).partition(".")
    return f"{prefix}{int(number) + first}.{rest}"


def _whole_expert(name: str, module: Any) -> str:
    """Return a parameter's name in a layer with the number that its expert has in the whole model."""
    head, mark, rest = name.partition(".local_experts.")
    if not mark:
        return name
    number, _, rest = rest.partition(".")
    here = module.config.num_moe_experts // mpu.get_expert_model_parallel_world_size()
    return f"{head}{mark}{int(number) + here * mpu.get_expert_model_parallel_rank()}.{rest}"


def shard(whole: Tensor, parameter: nn.Parameter, key: str) -> Tensor:
    """Return this tensor-parallel rank's part; a vocabulary is padded with rows of zeros."""
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    if ".local_experts." in key:
        rank, size = mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole if whole.shape == parameter.shape else F.pad(whole.T, (0, parameter.shape[0] - len(whole))).T
    axis = parameter.partition_dim
    missing = parameter.shape[axis] * size - whole.shape[axis]
    if missing:
        whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
    halves = whole.chunk(parameter.partition_stride, axis)  # gate and up: a part of each
    return torch.cat([half.chunk(size, axis)[rank] for half in halves], axis)


def kinds() -> set[str]:
    """Return the presets that fix what a kind of language model has."""
    from megavlm.architectures.decoders.decoder.presets import KINDS
    from megavlm.architectures.decoders.encoder_decoder.presets import KINDS as T5
    from megavlm.architectures.decoders.mamba.presets import KINDS as MAMBA

    return {*KINDS, *MAMBA, *T5}


def branches_of(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Write checkpoints and references of rows; return their language branches."""
    found = {}
    for name in names:
        write_reference(name, folder / name, folder / f"{name}.safetensors")
        found[name] = language_branch(name, folder / name)
    return found
