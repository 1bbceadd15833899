"""Tiny checkpoints of every family: by Transformers where it has the model, else by the original code's names."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qwen_reference
import torch
from qwen_reference import Sizes
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

if TYPE_CHECKING:
    from megavlm.evaluation.parity import Sample

QWEN_VL = Sizes(
    vocab=120, hidden=256, layers=4, heads=4, ffn=88, image=28, patch=7, width=40, vision_layers=2, vision_heads=4,
    vision_ffn=56, queries=16, rows=256, image_token=117,
)  # fmt: skip
CODEFUSE = Sizes(
    vocab=120, hidden=256, layers=2, heads=4, ffn=88, image=28, patch=7, width=40, vision_layers=2, vision_heads=4,
    vision_ffn=56, queries=256, rows=256, image_token=117,
)  # fmt: skip

State = dict[str, Tensor]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def qwen_config(s: Sizes) -> dict[str, Any]:
    """Return the config.json of a Qwen v1 model, keys as the hub's."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
        "hidden_size": s.hidden,
        "intermediate_size": 2 * s.ffn,
        "initializer_range": 0.02,
        "kv_channels": s.hidden // s.heads,
        "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": 8192,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": s.heads,
        "num_hidden_layers": s.layers,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "vocab_size": s.vocab,
    }


def visual_config(s: Sizes) -> dict[str, Any]:
    """Return the settings of Qwen-VL's tower."""
    return {
        "heads": s.vision_heads,
        "image_size": s.image,
        "image_start_id": s.image_token - 2,
        "layers": s.vision_layers,
        "mlp_ratio": s.vision_ffn / s.width,
        "output_dim": s.hidden,
        "patch_size": s.patch,
        "width": s.width,
    }


def write(directory: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], **files: str) -> Path:
    """Write a directory as the hub has them."""
    directory.mkdir(parents=True)
    save_file({name: value.contiguous().clone() for name, value in state.items()}, directory / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


def qwen_vl(directory: Path, dtype: torch.dtype = torch.float32, s: Sizes = QWEN_VL) -> Path:
    """Qwen-VL, with the buffers and the remote code that the published checkpoints have."""
    state = {name: value.to(dtype) for name, value in qwen_reference.random_state(s, 1).items()}
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    state["transformer.rotary_emb.inv_freq"] = torch.ones(8)
    visual = {**visual_config(s), "n_queries": s.queries}
    files = {"modeling_qwen.py": "raise SystemExit('remote code must not run')\n"}
    return write(directory, state, {**qwen_config(s), "visual": visual}, **files)


def write_reference(directory: Path, s: Sizes, out: Path) -> Path:
    """Write what the plain implementation computes of a Qwen-VL directory: two samples, with two images and none."""
    state, stored = load(directory), {}
    generator = torch.Generator().manual_seed(3)
    for name, length, starts in (("s0", 60, [2, 30]), ("s1", 21, [])):
        ids = torch.randint(0, s.image_token - 2, (length,), generator=generator)
        slots = torch.zeros(length, dtype=torch.bool)
        for start in starts:
            ids[start], ids[start + s.queries + 1] = s.image_token - 2, s.image_token - 1
            ids[start + 1 : start + 1 + s.queries] = s.image_token
            slots[start + 1 : start + 1 + s.queries] = True
        pixels = torch.randn(len(starts), 3, s.image, s.image, generator=generator)
        features = qwen_reference.encode(state, s, pixels)
        logits = qwen_reference.logits(state, s, ids, features)
        labels = torch.where(slots, -100, ids)
        labels[:4] = -100
        loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)
        if starts:
            stored[f"{name}.image_features"] = features
            ids[starts[0] + 1 : starts[0] + 4] = 7  # Qwen's processor writes the bytes of the path there
        stored |= {f"{name}.input_ids": ids[None], f"{name}.pixel_values": pixels, f"{name}.labels": labels[None]}
        stored |= {f"{name}.logits": logits[None], f"{name}.loss": loss.reshape(1)}
    save_file({name: value.contiguous().clone() for name, value in stored.items()}, out)
    return out


def qwen(directory: Path) -> Path:
    """Qwen v1 alone, in bf16."""
    state = qwen_reference.random_state(QWEN_VL, 2)
    return write(
        directory,
        {name: value.bfloat16() for name, value in state.items() if ".visual." not in name},
        qwen_config(QWEN_VL),
    )


def codefuse_name(name: str) -> str:
    """Return what CodeFuse-VLM calls a tensor of Qwen-VL."""
    own = name.removeprefix("transformer.visual.")
    if own == name:
        return name
    projector = own.startswith(("attn_pool.", "ln_post.")) or own == "proj"
    return ("transformer.mm_projector." if projector else "transformer.vision_tower.vision_tower.") + own


def codefuse_state(s: Sizes = CODEFUSE) -> State:
    """Qwen-VL's tensors under CodeFuse-VLM's names."""
    return {codefuse_name(name): value for name, value in qwen_reference.random_state(s, 3).items()}


def codefuse(directory: Path) -> Path:
    """CodeFuse-VLM whole."""
    config = {**qwen_config(CODEFUSE), "model_type": "llava_qwen", "architectures": ["LlavaQWenForCausalLM"],
              "mm_projector_type": "cross_attn", "mm_hidden_size": CODEFUSE.width, "mm_vision_tower": "x"}  # fmt: skip
    write(directory, codefuse_state(), config, **{"visual_config.json": json.dumps(visual_config(CODEFUSE))})
    return directory


def codefuse_parts(directory: Path) -> tuple[Path, Path, Path]:
    """CodeFuse-VLM in parts: LLM directory, the tower's directory, mm_projector.bin."""
    state = codefuse_state()
    language = write(
        directory / "llm",
        {n: v for n, v in state.items() if "vision_tower" not in n and "mm_projector" not in n},
        qwen_config(CODEFUSE),
    )
    tower = directory / "Qwen-VL-visual"
    tower.mkdir()
    prefix = "transformer.vision_tower.vision_tower."
    torch.save({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}, tower / "visual.bin")
    (tower / "visual_config.json").write_text(json.dumps(visual_config(CODEFUSE)))
    projector = directory / "mm_projector" / "mm_projector.bin"
    projector.parent.mkdir()
    torch.save({n: v for n, v in state.items() if "mm_projector" in n}, projector)
    return language, tower, projector


def codefuse_published(directory: Path) -> Path:
    """CodeFuse-VLM as it is published: the parts in one directory."""
    language, tower, projector = codefuse_parts(directory.parent / f"{directory.name}-parts")
    language.rename(directory)
    tower.rename(directory / "Qwen-VL-visual")
    projector.parent.rename(directory / "mm_projector")
    return directory


def codefuse_mlp(directory: Path) -> Path:
    """CodeFuse-VLM with an MLP for a connector."""
    s = CODEFUSE
    state = {n: v for n, v in codefuse_state().items() if "mm_projector" not in n}
    for layer, width in ((0, s.width), (2, s.hidden), (4, s.hidden)):
        state[f"transformer.mm_projector.{layer}.weight"] = torch.randn(s.hidden, width)
        state[f"transformer.mm_projector.{layer}.bias"] = torch.randn(s.hidden)
    config = {**qwen_config(s), "model_type": "llava_qwen", "mm_projector_type": "mlp3x_gelu"}
    return write(directory, state, config, **{"visual_config.json": json.dumps(visual_config(s))})


_TEXT: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
_CLIP_TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 8,
}  # fmt: skip


def made(model: type[PreTrainedModel], config: PretrainedConfig, seed: int = 5) -> PreTrainedModel:
    """Return a random model in which every parameter matters (Transformers starts biases at 0 and norms at 1)."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    one = model(config).eval()
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name and "vision" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return one


def llama() -> PreTrainedModel:
    """Llama with grouped queries and Llama 3's stretched positions."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    return made(LlamaForCausalLM, LlamaConfig(**_TEXT, rms_norm_eps=1e-5, rope_parameters=rope))


def vicuna() -> PreTrainedModel:
    """Llama 2's shape."""
    return made(LlamaForCausalLM, LlamaConfig(**{**_TEXT, "num_key_value_heads": 4}, rms_norm_eps=1e-5))


def qwen2() -> PreTrainedModel:
    """Qwen2 with a tied embedding."""
    return made(Qwen2ForCausalLM, Qwen2Config(**_TEXT, tie_word_embeddings=True))


def qwen3() -> PreTrainedModel:
    """Qwen3, heads wider than hidden_size / heads."""
    return made(Qwen3ForCausalLM, Qwen3Config(**_TEXT, head_dim=32))


def clip() -> PreTrainedModel:
    """OpenAI's CLIP: a dual encoder with quick_gelu."""
    config = CLIPConfig(text_config=CLIPTextConfig(**_CLIP_TEXT).to_dict(), projection_dim=16,
                        vision_config=CLIPVisionConfig(**_VISION).to_dict())  # fmt: skip
    return made(CLIPModel, config)


def clip_vision() -> PreTrainedModel:
    """LAION's CLIP: its vision half, with erf GELU."""
    return made(CLIPVisionModel, CLIPVisionConfig(**_VISION, hidden_act="gelu"))


def siglip() -> PreTrainedModel:
    """SigLIP, a dual encoder."""
    config = SiglipConfig(text_config=SiglipTextConfig(**_CLIP_TEXT, projection_size=32).to_dict(),
                          vision_config=SiglipVisionConfig(**_VISION).to_dict())  # fmt: skip
    return made(SiglipModel, config)


def siglip_vision() -> PreTrainedModel:
    """SigLIP's vision half."""
    return made(SiglipVisionModel, SiglipVisionConfig(**_VISION))


SQUASHED: dict[str, Any] = {
    "do_resize": True, "resample": 3, "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "do_convert_rgb": True,
}  # fmt: skip


def _publish(model: PreTrainedModel, directory: Path, **keys: Any) -> None:
    """Write weights, and how pictures are made pixels: squashed, by the numbers of the tower's kind."""
    type(model).save_pretrained(model, directory, **keys)
    vision = model.config.vision_config
    clip, side = vision.model_type.startswith("clip"), {"height": vision.image_size, "width": vision.image_size}
    numbers = (CLIP_MEAN, CLIP_STD) if clip else ([0.5] * 3, [0.5] * 3)
    kind = {"image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor", "size": side}
    tree = {**SQUASHED, **kind, "image_mean": numbers[0], "image_std": numbers[1]}
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(tree, indent=2))


def llava(text: PretrainedConfig | None = None, vision: PretrainedConfig | None = None, **keys: Any) -> PreTrainedModel:
    """LLaVA: CLIP, features of the layer before the last, and Llama."""
    text = text or LlamaConfig(**_TEXT, rms_norm_eps=1e-5)
    vision = vision or CLIPVisionConfig(**_VISION)
    one = made(
        LlavaForConditionalGeneration,
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=119, **keys),
    )
    one.save_pretrained = functools.partial(_publish, one)  # type: ignore[method-assign]
    return one


def llava_qwen_siglip() -> PreTrainedModel:
    """LLaVA of other parts: SigLIP, whose patches are all kept, and Qwen2."""
    keys = {"vision_feature_select_strategy": "full", "vision_feature_layer": -2}
    return llava(Qwen2Config(**_TEXT), SiglipVisionConfig(**_VISION, vision_use_head=False), **keys)


def llava_qwen3() -> PreTrainedModel:
    """LLaVA with Qwen3: norms on queries and keys, heads wider than hidden_size / heads."""
    return llava(Qwen3Config(**_TEXT, head_dim=32))


ORIGINAL = (
    ("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),
    ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""Names in LLaVA's own code, from Transformers' conversion (``convert_llava_weights_to_hf.py``)."""


def original_name(name: str) -> str:
    """Return what LLaVA's own code calls a tensor of ``LlavaForConditionalGeneration``."""
    return next(new + name.removeprefix(old) for old, new in ORIGINAL if name.startswith(old))


def llava_original(
    directory: Path, model: PreTrainedModel | None = None, *, tower: bool = True, depth: int = 2, **keys: Any
) -> Path:
    """LLaVA in its authors' layout, its tower inside or apart (in ``directory``-tower)."""
    one, apart = model or llava(), directory.with_name(f"{directory.name}-tower")
    one.save_pretrained(apart)
    state = {original_name(name): value for name, value in load(apart).items()}
    config = one.config
    text = config.text_config.to_dict()
    for layer in [layer for layer in range(4) if layer >= depth]:  # another depth than Transformers'
        for kind in ("weight", "bias"):
            state.pop(f"model.mm_projector.{2 * layer}.{kind}", None)
    for layer in range(2, depth):
        state[f"model.mm_projector.{2 * layer}.weight"] = torch.randn(text["hidden_size"], text["hidden_size"])
        state[f"model.mm_projector.{2 * layer}.bias"] = torch.randn(text["hidden_size"])
    layers, width = config.vision_feature_layer, config.vision_config.hidden_size
    own = {
        **text, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava",
        "mm_vision_tower": str(apart), "mm_projector_type": f"mlp{depth}x_gelu", "mm_vision_select_layer": layers,
        "mm_vision_select_feature": "patch", "mm_hidden_size": width * (len(layers) if isinstance(layers, list) else 1),
        "image_aspect_ratio": "pad", "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True,
        "tokenizer_model_max_length": 2048, "tokenizer_padding_side": "right", "unfreeze_mm_vision_tower": tower,
        **keys,
    }  # fmt: skip
    if own["mm_projector_type"] == "linear":
        state = {name.replace("mm_projector.0.", "mm_projector."): value for name, value in state.items()}
    if not tower:
        state = {name: value for name, value in state.items() if "vision_tower" not in name}
    one.model.vision_tower.save_pretrained(apart)
    return write(directory, state, own)


def llava_pickled(directory: Path) -> Path:
    """As most of them are published: two ``pytorch_model-*.bin`` with an index, in half precision."""
    llava_original(directory)
    state = {name: value.half() for name, value in load(directory).items()}
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for shard in (1, 2):
        file = f"pytorch_model-{shard:05d}-of-00002.bin"
        own = {name: value for i, (name, value) in enumerate(sorted(state.items())) if i % 2 == shard - 1}
        torch.save(own, directory / file)
        weight_map |= dict.fromkeys(own, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def llava_layers() -> PreTrainedModel:
    """LLaVA with the features of two layers, the higher one first."""
    return llava(vision_feature_layer=[-2, 1])


TRANSFORMERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama, "vicuna": vicuna, "qwen2": qwen2, "qwen3": qwen3, "clip": clip, "clip_vision": clip_vision,
    "siglip": siglip, "siglip_vision": siglip_vision, "llava": llava, "llava_qwen_siglip": llava_qwen_siglip,
    "llava_qwen3": llava_qwen3, "llava_layers": llava_layers,
}  # fmt: skip


def llava_named(directory: Path, tower: str, projector: str, model: str, head: str) -> Path:
    """LLaVA in another of the namings that are in use."""
    one = llava()
    one.save_pretrained(directory)
    renamed = {}
    for name, value in load(directory).items():
        for old, new in (
            ("vision_tower.vision_model.", tower), ("vision_tower.", tower), ("multi_modal_projector.", projector),
            ("language_model.model.", model), ("language_model.lm_head.", head),
        ):  # fmt: skip
            if name.startswith(old):
                renamed[new + name.removeprefix(old)] = value
                break
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def load(directory: Path) -> State:
    """Return all tensors of a directory, by the safetensors library."""
    from safetensors.torch import load_file

    state: State = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    return state


MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen_vl": qwen_vl,
    "qwen_vl_bf16": lambda path: qwen_vl(path, torch.bfloat16),
    "qwen": qwen,
    "codefuse": codefuse,
    "codefuse_mlp": codefuse_mlp,
    "llava_original": llava_original,
    "llava_original_bin": llava_pickled,
    "llava_original_layers": lambda path: llava_original(path, llava_layers()),
    "llava_original_linear": lambda path: llava_original(path, depth=1, mm_projector_type="linear"),
    "llava_original_mlp3_qwen2": lambda path: llava_original(
        path, llava(Qwen2Config(**_TEXT)), depth=3, model_type="llava_qwen"
    ),
    "llava_original_siglip": lambda path: llava_original(path, llava_qwen_siglip(), model_type="llava_qwen"),
    "llava_original_mistral": lambda path: llava_original(path, model_type="llava_mistral", sliding_window=None),
    "codefuse_tower": lambda path: codefuse_parts(path)[1],
    "llava_hub": lambda path: llava_named(
        path, "vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."
    ),
    "llava_modules": lambda path: llava_named(
        path, "model.vision_tower.vision_model.", "model.multi_modal_projector.", "model.language_model.", "lm_head."
    ),
}


def make(name: str, directory: Path) -> Path:
    """Make the checkpoint called ``name`` and return its directory."""
    if name in MAKERS:
        return MAKERS[name](directory)
    TRANSFORMERS[name]().save_pretrained(directory)
    return directory


FAMILY_OF: dict[str, str] = {
    "qwen_vl": "qwen_vl", "qwen_vl_bf16": "qwen_vl", "qwen": "qwen", "codefuse": "codefuse_vlm",
    "codefuse_mlp": "codefuse_vlm", "codefuse_tower": "qwen_visual", "llava_hub": "llava", "llava_modules": "llava",
    "llama": "llama", "vicuna": "llama", "qwen2": "llama", "qwen3": "llama", "clip": "clip", "clip_vision": "clip",
    "siglip": "siglip", "siglip_vision": "siglip", "llava": "llava", "llava_qwen_siglip": "llava",
    "llava_qwen3": "llava", "llava_layers": "llava",
    **dict.fromkeys([name for name in MAKERS if name.startswith("llava_original")], "llava_original"),
}  # fmt: skip
"""Whose checkpoint each of ``MAKERS`` and ``TRANSFORMERS`` is."""


IMAGE = 119
"""The image token of the small LLaVAs."""


def sample() -> Sample:
    """Return text with two images of 16 patches."""
    from megavlm.data.plans_single import SquashPlan
    from megavlm.evaluation.parity import Sample

    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, IMAGE, (50,), generator=generator)
    ids[3:19] = ids[22:38] = IMAGE
    layouts = [SquashPlan(28, 16).plan(28, 28)] * 2
    return Sample("s0", ids, torch.randn(2, 3, 28, 28, generator=generator), layouts, None, {})
