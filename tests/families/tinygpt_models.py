"""Tiny TinyGPT-V: what its code (DLYuanGod/TinyGPT-V @ 83f6189b) does.

Tower and Q-Former are MiniGPT-4's (``minigpt_models.py``), two linear layers follow (``encode_img`` of
``minigpt4/models/minigpt4.py``), and the language model is Transformers' Phi with norms of queries and keys, changed as
``modeling_phi.py`` changes it: ``post_layernorm``, an RMSNorm, of what attention gives. Its files have queries, keys
and values in one tensor, head by head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from family_cases import made
from minigpt_models import MiniGPT, MiniGPTSource, Sizes
from safetensors.torch import save_file
from spliced_models import IMAGE, filled
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM
from whole import Lack, Published, Stage, WholeFamily

_HEADS, _INSIDE = 4, 40
_TRAINED = "minigpt/llama_model.base_model.model.model."
_NORMS = ("input_layernorm", "self_attn.q_layernorm", "self_attn.k_layernorm", "post_layernorm")


class RMSNorm(nn.Module):
    """``LlamaRMSNorm`` of ``modeling_phi.py``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def changed_phi(vocab: int, heads: int = _HEADS) -> PhiForCausalLM:
    """Return Phi with TinyGPT-V's norms."""
    config = PhiConfig(
        vocab_size=vocab, hidden_size=16 * heads, intermediate_size=96, num_hidden_layers=4, num_attention_heads=heads,
        max_position_embeddings=512, qk_layernorm=True, partial_rotary_factor=0.5, rope_theta=10000.0,
        attn_implementation="eager", initializer_range=0.2,
    )  # fmt: skip
    model = made(PhiForCausalLM, config)
    for number, layer in enumerate(model.model.layers):
        layer.post_layernorm = filled(RMSNorm(16 * heads), 20 + number)
        for which in (layer.self_attn.q_layernorm, layer.self_attn.k_layernorm):
            filled(which, 40 + number)
        layer.self_attn.register_forward_hook(
            lambda _attention, _given, found, layer=layer: (layer.post_layernorm(found[0]), *found[1:])
        )
    return model


@dataclass(frozen=True)
class TinySizes(Sizes):
    """Of a tiny model."""

    queries: int | None = 5
    text_heads: int = _HEADS
    trained: bool = True
    """Whether the norms' weights, and both linear layers, are in the file of what was trained."""
    bare: bool = False
    """Whether Phi-2's file is as published: without the norms that TinyGPT-V adds."""


class TinyGPT(MiniGPT):
    """The whole model, for one sample at a time."""

    sizes: TinySizes

    def __init__(self, sizes: TinySizes) -> None:
        super().__init__(sizes)
        self.llama_proj = filled(nn.Linear(256, _INSIDE), 7)
        self.llama_proj2 = filled(nn.Linear(_INSIDE, 16 * sizes.text_heads), 8)
        self.llama_model = changed_phi(sizes.vocab, sizes.text_heads)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Return [N, T, E]."""
        found: Tensor = self.llama_proj2(super().get_image_features(pixel_values))
        return found

    def named(self, name: str) -> str:
        """Return what a checkpoint calls a parameter: its file, and the name in there."""
        own = name.removeprefix("llama_model.model.")
        if self.sizes.trained and own.endswith("layernorm.weight") and name.startswith("llama_model."):
            return _TRAINED + own
        return super().named(name)

    def fused(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by their published names: queries, keys and values [heads, 3, 16] in one."""
        found: dict[str, Tensor] = {}
        for name, value in tensors.items():
            if ".self_attn.q_proj." in name:
                three = [tensors[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
                heads = [one.unflatten(0, (self.sizes.text_heads, -1)) for one in three]
                found[self.named(name).replace("q_proj", "query_key_value")] = torch.cat(heads, 1).flatten(0, 1)
            elif ".k_proj." not in name and ".v_proj." not in name:
                found[self.named(name)] = value
        return found

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of the files beside the language model's."""
        return {file: state for file, state in self.all_files().items() if file != "llm"}

    def all_files(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of each file, the language model's among them."""
        found = super().files()
        for name, value in self.fused(self.state_dict()).items():
            file, _, own = name.partition("/")
            if file == "llm" or own.startswith("llama_model."):
                found.setdefault(file, {})[own] = value
        if self.sizes.trained:  # Phi-2 has norms of its own, which are not used
            generator = torch.Generator().manual_seed(3)
            kept = [name for name in found["minigpt"] if "layernorm" in name]
            for name in kept:
                own = name.removeprefix("llama_model.base_model.model.")
                if "input_layernorm" in own or "final" in own:
                    found["llm"][own] = torch.randn(found["minigpt"][name].shape, generator=generator)
        if self.sizes.bare:
            added = ("q_layernorm", "k_layernorm", "post_layernorm")
            found["llm"] = {n: v for n, v in found["llm"].items() if not any(one in n for one in added)}
        return found

    def adapters(self) -> dict[str, Tensor]:
        """Return the tensors of adapters on all that its code adapts, as PEFT calls them."""
        rank, found = self.sizes.lora, {}
        width = 16 * self.sizes.text_heads
        for i in range(len(self.llama_model.model.layers) if rank else 0):
            for part, out in (("query_key_value", 3 * width), ("dense", width)):
                name = f"llama_model.base_model.model.model.layers.{i}.self_attn.{part}.lora_"
                generator = torch.Generator().manual_seed(out + i)
                found[f"{name}A.default.weight"] = torch.randn(rank, width, generator=generator) / 8
                found[f"{name}B.default.weight"] = torch.randn(out, rank, generator=generator) / 8
        return found

    @torch.no_grad()
    def add_adapters(self) -> None:
        """Add what adapters do to the weights: alpha 16, B A."""
        given = self.adapters()
        for i, layer in enumerate(self.llama_model.model.layers):
            head = f"llama_model.base_model.model.model.layers.{i}.self_attn."
            added = {
                part: 16 / (self.sizes.lora or 1) * given[f"{head}{part}.lora_B.default.weight"]
                @ given[f"{head}{part}.lora_A.default.weight"]
                for part in ("query_key_value", "dense")
            }  # fmt: skip
            layer.self_attn.dense.weight += added["dense"]
            three = added["query_key_value"].unflatten(0, (self.sizes.text_heads, 3, -1)).unbind(1)
            for which, one in zip("qkv", three, strict=True):
                getattr(layer.self_attn, f"{which}_proj").weight.add_(one.flatten(0, 1))

    def save_pretrained(self, directory: Path) -> Path:
        """Write all files."""
        super().save_pretrained(directory)
        llm = {name: value.contiguous() for name, value in self.all_files()["llm"].items()}
        save_file(llm, directory / "llm" / "model.safetensors", metadata={"format": "pt"})
        return directory


class TinyGPTSource(MiniGPTSource):
    """One of these as a source of parity."""

    def __init__(self, sizes: TinySizes) -> None:
        super(MiniGPTSource, self).__init__("tinygpt_v", lambda: TinyGPT(sizes), vocab=120, image=IMAGE)  # type: ignore[arg-type, return-value]

    def gradients(self) -> dict[str, Tensor]:
        """Return those that there are."""
        return self.model.fused({name: p.grad for name, p in self.model.named_parameters() if p.grad is not None})


TINY = TinySizes(settings={"arch": "minigpt4"})
STAGE_4 = TinySizes(grid=2, settings={"arch": "minigpt_v2"}, lora=4)
START = TinySizes(trained=False, projection=False, bare=True)


def save(sizes: TinySizes) -> Callable[[Path], Path]:
    """Return what writes a checkpoint."""
    return lambda path: TinyGPT(sizes).save_pretrained(path)


TINYGPT: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "tinygpt_v": ("tinygpt_v", save(STAGE_4)),
    "tinygpt_v_start": ("tinygpt_v", save(replace(TINY, trained=False))),
}
"""Checkpoints, with their family."""

_ADAM = (0.9, 0.999, 1e-8, 0)


def tinygpt_rows(header: str, planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the rows of ``whole_rows.py``; arguments are what rows share."""
    first = Stage(
        ("connector", "language"), 1e-4, 5000, 64, 2048, 32, warmup=1000, decay=0.05, template="llava_plain",
        least=8e-5, adam=_ADAM, lora=(64, 16),
    )  # fmt: skip
    second = replace(first, steps=20_000, after="tinygpt_v_224/pretrain", warmup=5000)
    third = replace(
        first, lr=3e-5, steps=1000, batch=6, after="tinygpt_v_224/pretrain_2", warmup=200, template=None, least=1e-5
    )
    fourth = replace(third, lr=1e-5, steps=50_000, batch=4, after="tinygpt_v_224/sft", warmup=1000)
    shared: dict[str, Any] = {
        "image": {"kind": "squash"}, "headers": header, "planner": planner,
        "answers": Lack("Transformers has no class for it: answers are held against the written-out one, in `source`"),
        "lora": Lack("adapters are those of llm/ alone; those in the trainer's own file: test_tinygpt.py"),
        "built": Lack("no class to build: counted from its parts in test_tinygpt.py"),
        "template": Lack("by tokenizer: test_tinygpt.py"),
    }  # fmt: skip
    return {
        "tinygpt_v": WholeFamily(
            checkpoints=("tinygpt_v", "tinygpt_v_start"),
            source=TinyGPTSource(replace(TINY, lora=None)),
            uneven=TinyGPTSource(replace(TINY, heads=3, text_heads=8)),
            others={"stage 4": TinyGPTSource(replace(STAGE_4, lora=None))},
            presets={"tinygpt_v_224": Published(3_884_473_728), "tinygpt_v": Published(3_884_473_728)},
            recipes={
                "tinygpt_v_224/pretrain": first,
                "tinygpt_v_224/pretrain_2": second,
                "tinygpt_v_224/sft": third,
                "tinygpt_v/sft": fourth,
            },
            **shared,
        ),
    }
