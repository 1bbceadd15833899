"""Compare decoders and towers with Transformers' models of the same weights, at any tensor-parallel size.

The weights are mapped by hand: an account of every layout, apart from the converter's. The map is linear, so it also
takes Transformers' gradients to what ours must be.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from samples import recipe
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Glm4vTextConfig,
    Glm4vTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLTextConfig,
    Qwen2VLTextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megavlm.config.architecture import LANGUAGE, VISION
from megavlm.layers.segments import packed_segments
from megavlm.models.build import build_context

# Segments of a pack, long enough that a stretched rotary table shows.
LENGTHS = (400, 37)
VOCAB, HEADS, GROUPS, HEAD_DIM, HIDDEN, LAYERS = 256, 4, 2, 16, 48, 2
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Decoder:
    """A language model: Transformers' classes and what they are told, and our preset and what it is told."""

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    theirs: dict[str, Any]
    preset: str
    ours: dict[str, Any]
    axes: int = 1


def mrope(sections: list[int], **more: Any) -> dict[str, Any]:
    """Return what a model with M-RoPE is told; Qwen2-VL's heads are always hidden / heads wide."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **more}
    return {"hidden_size": HEADS * HEAD_DIM, "rope_parameters": rope}


DECODERS = {
    "llama": Decoder(LlamaConfig, LlamaForCausalLM, {"rms_norm_eps": 1e-5}, "llama", {"norm_epsilon": 1e-5}),
    "llama-linear": Decoder(
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        "llama",
        {"rope_scaling": "linear", "rope_scaling_factor": 4},
    ),
    "llama-llama3": Decoder(
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, **LLAMA3}},
        "llama",
        {"rope_scaling": "llama3", "rope_scaling_factor": 8, "rotary_base": 500000},
    ),
    "qwen2-tied": Decoder(
        Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}, "qwen2", {"tie_word_embeddings": True}
    ),
    "qwen3": Decoder(Qwen3Config, Qwen3ForCausalLM, {"attention_bias": False}, "qwen3", {}),
    "qwen2-vl-text": Decoder(
        Qwen2VLTextConfig, Qwen2VLTextModel, mrope([2, 3, 3]), "qwen2", {"rotary_sections": (2, 3, 3)}, axes=3
    ),
    "qwen2.5-vl-text": Decoder(
        Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, mrope([4, 1, 3]), "qwen2", {"rotary_sections": (4, 1, 3)}, axes=3
    ),
    "qwen3-vl-text": Decoder(
        Qwen3VLTextConfig, Qwen3VLTextModel, mrope([3, 3, 2], mrope_interleaved=True), "qwen3",
        {"rotary_sections": (3, 3, 2), "rotary_sections_interleaved": True}, axes=3,
    ),
    "glm-4.1v-text": Decoder(
        Glm4vTextConfig, Glm4vTextModel, {**mrope([1, 2, 1], partial_rotary_factor=0.5), "rms_norm_eps": 1e-5}, "glm4",
        {"rotary_sections": (1, 2, 1)}, axes=3,
    ),
}  # fmt: skip


class WithHead(nn.Module):
    """A text model of Transformers that comes without a head, as its class for pictures has one."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> SimpleNamespace:
        hidden = self.model(input_ids=input_ids, position_ids=position_ids).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden))


def random_positions(axes: int) -> Tensor:
    """[axes, S] positions in no order for three axes; from 0 in each segment for one."""
    if axes == 1:
        return torch.cat([torch.arange(n) for n in LENGTHS])
    return torch.randint(0, 300, (axes, sum(LENGTHS)), generator=torch.Generator().manual_seed(10))


@dataclass(frozen=True)
class Tower:
    """A vision tower; ``layers`` of Transformers' run in ours."""

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    activation: str
    preset: str
    ours: dict[str, Any]
    layers: int


TOWERS = {
    "clip": Tower(CLIPVisionConfig, CLIPVisionModel, "quick_gelu", "clip_vit", {"activation": "quick_gelu"}, 2),
    "clip-gelu": Tower(CLIPVisionConfig, CLIPVisionModel, "gelu", "clip_vit", {}, 3),
    "siglip": Tower(SiglipVisionConfig, SiglipVisionModel, "gelu_pytorch_tanh", "siglip_vit", {}, 3),
}
CASES = (*DECODERS, *TOWERS)
# 30 pixels are 4 patches of 7, and 2 pixels that no patch holds.
IMAGES, IMAGE, PATCH, GRID, WIDTH, VISION_HEADS, FFN = 3, 30, 7, 4, 40, 2, 56


def fill(model: nn.Module) -> None:
    """Give every weight a random value: norms around one, all others around zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() == 1 else 0.15))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)


def qkv(state: dict[str, Tensor], prefix: str, kind: str, groups: int) -> Tensor:
    """Return Megatron's joined projection: for each key/value head its queries, its key and its value."""
    parts = [state[f"{prefix}{name}_proj.{kind}"].unflatten(0, (groups, -1)) for name in "qkv"]
    return torch.cat(parts, dim=1).flatten(0, 1)


def decoder_map(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Transformers' tensors of a decoder in our names and layouts."""
    out = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
    }
    if "lm_head.weight" in state:
        out["output_layer.weight"] = state["lm_head.weight"]
    for i in range(LAYERS):
        mine, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            if f"{theirs}self_attn.q_proj.{kind}" in state:
                out[f"{mine}self_attention.linear_qkv.{kind}"] = qkv(state, theirs + "self_attn.", kind, GROUPS)
        gated = "mlp.gate_up_proj" if f"{theirs}mlp.gate_up_proj.weight" in state else "mlp.gate_proj mlp.up_proj"
        parts = [state[f"{theirs}{name}.weight"] for name in gated.split()]
        out[mine + "mlp.linear_fc1.weight"] = torch.cat(parts)
        for a, b in (
            ("self_attention.linear_proj", "self_attn.o_proj"),
            ("mlp.linear_fc2", "mlp.down_proj"),
            ("input_layernorm", "input_layernorm"),
            ("pre_mlp_layernorm", "post_attention_layernorm"),
            ("self_attention.q_layernorm", "self_attn.q_norm"),
            ("self_attention.k_layernorm", "self_attn.k_norm"),
            ("self_attn_bda.norm", "post_self_attn_layernorm"),
            ("mlp_bda.norm", "post_mlp_layernorm"),
        ):
            if f"{theirs}{b}.weight" in state:
                out[f"{mine}{a}.weight"] = state[f"{theirs}{b}.weight"]
    return out


def tower_map(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Return Transformers' tensors of a tower in our names and layouts."""
    names = {"conv1.weight": "embeddings.patch_embedding.weight", "conv1.bias": "embeddings.patch_embedding.bias"}
    names |= {"positional_embedding": "embeddings.position_embedding.weight"}
    names |= {"class_embedding": "embeddings.class_embedding"}
    out = {}
    for kind in ("weight", "bias"):
        names |= {f"ln_pre.{kind}": f"pre_layrnorm.{kind}", f"ln_post.{kind}": f"post_layernorm.{kind}"}
        for i in range(layers):
            mine, theirs = f"transformer.layers.{i}.", f"encoder.layers.{i}."
            out[f"{mine}self_attention.linear_qkv.{kind}"] = qkv(state, theirs + "self_attn.", kind, VISION_HEADS)
            for a, b in (
                ("self_attention.linear_proj", "self_attn.out_proj"),
                ("mlp.linear_fc1", "mlp.fc1"),
                ("mlp.linear_fc2", "mlp.fc2"),
                ("input_layernorm", "layer_norm1"),
                ("pre_mlp_layernorm", "layer_norm2"),
            ):
                names[f"{mine}{a}.{kind}"] = f"{theirs}{b}.{kind}"
    return out | {mine: state[theirs] for mine, theirs in names.items() if theirs in state}


def shard(full: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return this tensor-parallel rank's part of a tensor."""
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    halves = full.chunk(parameter.partition_stride)  # gate and up: a part of each
    return torch.cat([half.chunk(size, parameter.partition_dim)[rank] for half in halves])


def load(ours: nn.Module, mapped: dict[str, Tensor]) -> None:
    """Copy the tensors into our parameters; every parameter must have one, and every tensor a parameter."""
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == mapped.keys(), parameters.keys() ^ mapped.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = shard(mapped[name], parameter)
            assert value.shape == parameter.shape, name
            parameter.copy_(value)


def close(got: Tensor, expected: Tensor, what: str) -> None:
    """Within 1e-5 of the largest value: the sums are made in another order."""
    torch.testing.assert_close(
        got, expected, rtol=0, atol=1e-5 * expected.detach().abs().max().item(), msg=lambda m: f"{what}: {m}"
    )


def same_gradients(ours: nn.Module, mapped: dict[str, Tensor]) -> None:
    """Compare the gradient of every parameter of ours."""
    for name, parameter in ours.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if "q_layernorm" in name or "k_layernorm" in name:  # each rank saw its own heads
            dist.all_reduce(gradient, group=mpu.get_tensor_model_parallel_group())
        assert mapped[name].abs().max() > 0, name
        close(gradient, shard(mapped[name], parameter), name)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients that there are."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare_decoder(name: str) -> None:
    """Compare the logits of a pack of two segments, and all gradients."""
    case = DECODERS[name]
    config = case.config(
        vocab_size=VOCAB, intermediate_size=72, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, head_dim=HEAD_DIM, max_position_embeddings=16384,
        **{"hidden_size": HIDDEN, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, **case.theirs},
    )  # fmt: skip
    reference = case.model(config) if case.axes == 1 else WithHead(case.model(config))
    fill(reference)
    size = mpu.get_tensor_model_parallel_world_size()
    language = {
        "preset": case.preset, "vocab_size": VOCAB, "hidden_size": config.hidden_size, "ffn_hidden_size": 72,
        "num_layers": LAYERS, "num_attention_heads": HEADS, "num_query_groups": GROUPS, "kv_channels": HEAD_DIM,
        "max_position_embeddings": 16384, **case.ours,
    }  # fmt: skip
    made = recipe(
        model={"preset": "tiny", "language": language}, parallel={"tensor_model_parallel_size": size}
    )  # the model branch replaces that of the tiny recipe
    ours = LANGUAGE.find(case.preset).build(made.model.language, build_context(made))
    load(ours, decoder_map(dict(reference.named_parameters())))

    tokens = torch.randint(0, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(6))
    positions = random_positions(case.axes)
    borders = np.cumsum([0, *LENGTHS]).astype(np.int32)
    packed = packed_segments(borders, tokens.device, positions if case.axes > 1 else None)
    logits = ours(input_ids=tokens, position_ids=positions[None], attention_mask=None, packed_seq_params=packed)
    logits = gather_from_tensor_model_parallel_region(logits)
    expected = torch.cat(
        [
            reference(input_ids=part, **({} if case.axes == 1 else {"position_ids": at[:, None]})).logits
            for part, at in zip(tokens.split(LENGTHS, dim=1), positions.split(LENGTHS, dim=-1), strict=True)
        ],
        dim=1,
    )
    close(logits, expected, "logits")
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    same_gradients(ours, decoder_map(gradients_of(reference)))


def compare_tower(name: str) -> None:
    """Compare the features of the patches, and all gradients."""
    case = TOWERS[name]
    config = case.config(
        hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=3, num_attention_heads=VISION_HEADS,
        image_size=IMAGE, patch_size=PATCH, hidden_act=case.activation,
    )  # fmt: skip
    reference = case.model(config)
    fill(reference)
    size = mpu.get_tensor_model_parallel_world_size()
    vision = {
        "preset": case.preset, "image_size": IMAGE, "patch_size": PATCH, "hidden_size": WIDTH, "ffn_hidden_size": FFN,
        "num_layers": case.layers, "num_attention_heads": VISION_HEADS, "positional_grid": GRID, **case.ours,
    }  # fmt: skip
    made = recipe(model={"preset": "tiny", "vision": vision}, parallel={"tensor_model_parallel_size": size})
    ours = VISION.find(case.preset).build(made.model.vision, build_context(made))
    keep = made.model.vision.post_layernorm
    weights_of = {n: p for n, p in reference.named_parameters() if keep or not n.startswith("post_layernorm")}
    load(ours, tower_map(weights_of, case.layers))

    pixels = torch.randn(IMAGES, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(8))
    out = reference(pixel_values=pixels, output_hidden_states=True)
    if keep:
        expected = out.last_hidden_state
    else:
        expected = out.hidden_states[case.layers][:, 1:]  # -2 of 3 layers, without the class token
    got = ours(pixels)
    assert got.shape == (made.model.vision.patches_per_image, IMAGES, WIDTH)
    close(got.transpose(0, 1), expected, "features")
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    (got.transpose(0, 1) * weights).sum().backward()
    (expected * weights).sum().backward()
    same_gradients(ours, tower_map(gradients_of(reference), case.layers))


def compare(name: str) -> None:
    """Compare one of ``CASES`` on this job's tensor-parallel ranks."""
    (compare_decoder if name in DECODERS else compare_tower)(name)
