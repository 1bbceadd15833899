"""Both systems of ``moe``: Qwen3-MoE alone, on text, from the same weights, whose routers prefer some experts.

Sizes are Qwen3-30B-A3B's divided by 8, with all of its 128 experts, of which a token takes 8, and 4 layers (48). A
router that was trained is skewed; one that was drawn is not. So each embedding here has a part that all have, and each
router reads off it a preference that falls with the expert's rank as a Zipf distribution does; ranks are drawn for
each layer. What loads come out is counted and reported.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from mixes import IMAGE_TOKEN, PAD_TOKEN, VOCABULARY, Sample
from vs_worker import CLIP, LEARNING_RATE, Megavlm, Transformers, Work, _count

LAYERS, HIDDEN, HEADS, GROUPS, HEAD = 4, 256, 4, 1, 64
EXPERTS, TOP, WIDTH = 128, 8, 96
ZIPF = 0.6
"""A token prefers an expert by the power of minus this of its rank, times what is the token's own."""
PREFIX = "language.decoder.layers."


def reference(implementation: str) -> Any:
    """Return Transformers' model, the same at each call: loads are skewed."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, head_dim=HEAD, num_experts=EXPERTS, num_experts_per_tok=TOP,
        moe_intermediate_size=WIDTH, norm_topk_prob=True, tie_word_embeddings=False, use_cache=False,
        max_position_embeddings=2048, attn_implementation="sdpa", experts_implementation=implementation,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    assert model.config._experts_implementation == implementation
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding *= 25  # larger than what attention adds, which tokens of a sample have in common
        shared = torch.randn(HIDDEN, generator=generator) * embedding.std() / 2
        embedding += shared
        size = embedding.square().mean().sqrt()
        for layer in model.model.layers:
            rank = torch.randperm(EXPERTS, generator=generator) + 1
            preference = -ZIPF * rank.float().log()
            noise = torch.randn(EXPERTS, HIDDEN, generator=generator) * (math.pi / math.sqrt(6 * HIDDEN))
            noise -= (noise @ shared)[:, None] * shared / shared.square().sum()
            layer.mlp.gate.weight.copy_(noise + preference[:, None] * shared * size / shared.square().sum())
    return model


def mapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return Transformers' tensors in our names and layouts."""
    out = {
        "language.embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "language.decoder.final_layernorm.weight": state["model.norm.weight"],
        "language.output_layer.weight": state["lm_head.weight"],
    }
    names = {
        "self_attention.linear_proj": "self_attn.o_proj", "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm", "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm", "mlp.router": "mlp.gate",
    }  # fmt: skip
    for i in range(LAYERS):
        mine, theirs = f"{PREFIX}{i}.", f"model.layers.{i}."
        out |= {f"{mine}{a}.weight": state[f"{theirs}{b}.weight"] for a, b in names.items()}
        parts = [state[f"{theirs}self_attn.{name}_proj.weight"].unflatten(0, (GROUPS, -1)) for name in "qkv"]
        out[f"{mine}self_attention.linear_qkv.weight"] = torch.cat(parts, dim=1).flatten(0, 1)
        for a, b in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
            for expert, weight in enumerate(state[f"{theirs}mlp.experts.{b}"]):
                out[f"{mine}mlp.experts.local_experts.{expert}.{a}.weight"] = weight
    return out


def in_order(samples: list[Sample], pack_length: int) -> list[list[int]]:
    """Return which of equally long samples make each batch, the same for both systems."""
    size = pack_length // len(samples[0])
    assert size * len(samples[0]) == pack_length, "samples that do not fill a pack"
    return [list(range(i, i + size)) for i in range(0, len(samples) - size + 1, size)]


class GroupedTransformers(Transformers):
    """Transformers' model by its grouped products, with torch's fused AdamW."""

    implementation = "grouped_mm"

    def __init__(self, pack_length: int) -> None:
        self.pack_length = pack_length
        self.model: Any = reference(self.implementation).train()
        # As megavlm has it: norms are not decayed.
        groups = [
            {"params": [p for p in self.model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in self.model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        # Epsilon as megavlm's default.
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.loads: list[list[int]] = [[] for _ in range(LAYERS)]
        self.hooks = [
            layer.mlp.gate.register_forward_hook(lambda _m, _i, out, row=row: self._count_loads(row, out))
            for row, layer in enumerate(self.model.model.layers)
        ]

    def _count_loads(self, row: int, out: Any) -> None:
        self.loads[row] = torch.bincount(out[2].flatten(), minlength=EXPERTS).tolist()

    def batches(self, samples: list[Sample], batching: str) -> list[tuple[Any, Work]]:
        """Batches in the samples' order (``in order``), or as the other shapes' are made."""
        if batching != "in order":
            return super().batches(samples, batching)
        return [self._collate([samples[i] for i in chunk]) for chunk in in_order(samples, self.pack_length)]

    def _collate(self, samples: list[Sample]) -> tuple[Any, Work]:
        (tokens, labels, mask, _), work = super()._collate(samples)
        return {"input_ids": tokens, "labels": labels, "attention_mask": mask}, work

    def step(self, batch: Any) -> float:
        """Forward, backward, clip, update; the first one, which is not counted, counts loads."""
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        while self.hooks:
            self.hooks.pop().remove()
        return float(loss)

    def told(self) -> dict[str, Any]:
        """Return the loads of the first step."""
        return {"loads": self.loads}


class EagerTransformers(GroupedTransformers):
    """The same by a loop over experts, written out."""

    implementation = "eager"


def recipe_of(pack_length: int) -> Any:
    """Return megavlm's run: a tower that nobody needs, frozen, and the language model."""
    from pydantic import TypeAdapter

    from megavlm.config.schema import Recipe
    from megavlm.families.presets import expand_presets

    tower = {"image_size": 32, "hidden_size": 48, "num_layers": 1, "ffn_hidden_size": 96, "num_attention_heads": 4}
    language = {
        "preset": "qwen3_moe", "hidden_size": HIDDEN, "num_layers": LAYERS, "ffn_hidden_size": WIDTH,
        "num_attention_heads": HEADS, "num_query_groups": GROUPS, "kv_channels": HEAD, "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048, "rotary_base": 10000, "num_moe_experts": EXPERTS, "moe_router_topk": TOP,
        "moe_ffn_hidden_size": WIDTH, "moe_aux_loss_coeff": 0.0,
    }  # fmt: skip
    tree = {
        "output_dir": "unused",
        "model": {
            "preset": "tiny",
            "vision": {**tower, "positional_grid": 2},
            "connector": {"num_queries": 4, "head_dim": 16},
            "language": language,
        },
        "data": {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": pack_length},
        "optimizer": {"lr": LEARNING_RATE, "clip_grad": CLIP, "weight_decay": 0.1, "schedule": "constant"},
        "training": {"train_steps": 1000, "global_batch_size": 1, "precision": "fp32"},
        "modules": {"vision": {"freeze": True}, "connector": {"freeze": True}},
    }
    return TypeAdapter(Recipe).validate_python(expand_presets(tree))


class MoeMegavlm(Megavlm):
    """megavlm's own model of these weights, optimizer and step."""

    def __init__(self, pack_length: int) -> None:
        from megavlm.data.spans import spans_of
        from megavlm.training.build import build_training

        self.pack_length, recipe = pack_length, recipe_of(pack_length)
        self.training, self.spans = build_training(recipe, IMAGE_TOKEN), spans_of(recipe.model, IMAGE_TOKEN)
        weights = mapped(dict(reference("eager").named_parameters()))
        own = {name: one for name, one in self.training.modules[0].named_parameters() if name.startswith("language.")}
        assert own.keys() == weights.keys(), own.keys() ^ weights.keys()
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        self.training.optimizer.reload_model_params()
        self.parameters = sum(p.numel() for p in own.values())
        self.loads: list[list[int]] = []

    def batches(self, samples: list[Sample], batching: str) -> list[tuple[Any, Work]]:
        """Packs in the samples' order (``in order``), or as the reader makes them."""
        from megavlm.data.chat import EncodedSample
        from megavlm.data.device_batch import make_batch
        from megavlm.data.packing import PackableSample, build_pack

        if batching != "in order":
            return super().batches(samples, batching)
        found = []
        for chunk in in_order(samples, self.pack_length):
            members = [samples[i] for i in chunk]
            packed = [PackableSample(EncodedSample(one.tokens, one.labels, 0), (), "", 0) for one in members]
            pack = build_pack(packed, self.pack_length, PAD_TOKEN, spans=self.spans)
            pixels = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
            found.append((make_batch(pack, pixels, torch.device("cpu")), _count(members, self.pack_length)))
        return found

    def step(self, batch: Any) -> float:
        """Take megavlm's training step, which counts loads each time."""
        from megavlm.training.step import train_step

        self.training.scheduler.step(1)
        result = train_step(self.training.chunks, self.training.optimizer, [batch], num_sources=1)
        assert result.experts is not None
        self.loads = self.loads or result.experts.loads.tolist()
        return result.loss

    def told(self) -> dict[str, Any]:
        """Return the loads of the first step."""
        return {"loads": self.loads}
