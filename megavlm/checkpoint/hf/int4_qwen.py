"""Qwen v1's language models in 4 bits, in the layout of Qwen/Qwen-VL-Chat-Int4: Qwen, Qwen-VL, Belle-VL, CodeFuse-VLM.

Transformers has no class for these, and code of a checkpoint is not run. The language model alone is what
``Qwen2ForCausalLM`` computes (norms without a bias, rotary positions, a bias on q, k and v, a gated MLP whose gate is
``w2``), as long as a text is no longer than ``seq_length``, beyond which Qwen v1 stretches its positions. So this class
is quantised, with the features that tower and connector here make in the places of pictures, and its tensors are
written under Qwen's names. Scales and zero points belong to groups of a layer's inputs and one output: q, k and v side
by side along the outputs are ``c_attn``, bit for bit.

Layout: ``config.json``, ``quantize_config.json`` and the names in ``model.safetensors.index.json`` of the published
directory. As there, all that is not packed is fp16, in which the kernels of both layouts compute, and AutoGPTQ's layers
have a bias each, of zeros where the model has none.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint.finite import check_finite
from megavlm.checkpoint.hf.accounting import Account, check_source
from megavlm.checkpoint.hf.calibration import FEATURES, Inputs, calibration_samples
from megavlm.checkpoint.hf.given import SourceOfParts, open_directory, understand
from megavlm.checkpoint.hf.own_calibration import OwnSamples, front_of, tokenizer_of_directory
from megavlm.checkpoint.hf.shapes import Rule, alone, family_slots, make_rules
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.data.tokenizer import Tokenizer
from megavlm.weights.source import CONFIG, Source, TensorInfo

DTYPE = torch.float16
"""Of all that has not 4 bits."""
QUANTIZE_CONFIG = "quantize_config.json"
"""What AutoGPTQ reads, beside ``quantization_config`` in ``config.json``."""
_KNOWN_BY = "transformer.h.0.mlp.w2.weight"
_LINEAR = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.w2": ("mlp.gate_proj",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
"""Names in ``modeling_qwen.py``, and those of Qwen2's class: side by side along the outputs."""
_NORMS = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
_REST = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_PACKED = ("qweight", "qzeros", "scales")
"""[.., out] or [.., out / 8], in both layouts: what stands beside the other along the outputs is appended to it."""


def is_qwen(source: Source) -> bool:
    """Whether the tensors of a language model have the names of ``modeling_qwen.py``."""
    return _KNOWN_BY in source


@dataclass(frozen=True)
class QwenDirectory:
    """A directory with a language model of Qwen v1."""

    one: SourceOfParts
    model: ModelConfig
    tokenizer: Tokenizer
    rules: list[Rule]
    account: Account
    longest: int

    @staticmethod
    def open(directory: Path, longest: int) -> QwenDirectory:
        """Open a directory, and check what is known before anything is computed.

        Args:
            directory: whose tensors :func:`is_qwen` knows.
            longest: tokens of a sample.

        Raises:
            UserError: the directory is damaged or in pieces, has no tokenizer, or samples may be too long.
        """
        given, _ = open_directory(directory)
        if len(given) != 1 or given[0].source.directory != directory:
            raise UserError(
                f"{directory}: is in pieces; int4 takes one directory, which megavlm convert hf-to-megatron and "
                "megatron-to-hf write of it"
            )
        one, found = given[0], understand(given, {}, None)
        trained = found.model.language.seq_length
        if trained is not None and longest > trained:
            raise UserError(
                f"--max-length {longest}: {directory / CONFIG} has seq_length {trained}, beyond which Qwen stretches "
                f"positions as no class of Transformers does; at most {trained}"
            )
        with alone():
            rules = make_rules(one.family, found.model, one.style, family_slots(one.family, found.model))
        account = check_source(one.source, one.family, one.style, found.model, rules)
        for name in (*account.used, *account.carried):
            _check_room(one.source.get(name), f"{directory}: {name}")
        return QwenDirectory(one, found.model, tokenizer_of_directory(one, found), rules, account, longest)

    def samples(self, data: Path, images: Path | None, count: int, seed: int) -> list[Inputs]:
        """Return samples as :meth:`language_model` takes them; tower and connector are gone then.

        Raises:
            UserError: no sample can be used.
        """

        def drawn(front: Any) -> list[Inputs]:
            take = OwnSamples(self.one, self.model, self.tokenizer, data, self.longest, front)
            return calibration_samples(data, images, take, count=count, longest=self.longest, seed=seed)

        if "vision" not in self.one.parts:
            return drawn(None)
        types = {self.one.source.tensors[name].dtype for name in self.account.used}
        dtype = torch.bfloat16 if torch.bfloat16 in types else torch.float32
        with front_of(self.one, self.model, self.rules, self.tokenizer.imgpad_id, dtype) as front:
            found = drawn(front)
            del front
        gc.collect()
        return found

    def language_model(self, dtype: torch.dtype) -> Any:
        """Return the language model as a class of Transformers."""
        import transformers  # noqa: PLC0415 - optional

        slot = self.tokenizer.imgpad_id

        class WithFeatures(transformers.Qwen2ForCausalLM):
            """Qwen2, with features in the places of pictures."""

            def forward(self, input_ids: Tensor, **more: Any) -> Any:
                """Run on [1, S] ids and [1, T, E] features of the T slots."""
                features = more.pop(FEATURES, None)
                embeddings = self.get_input_embeddings()(input_ids)
                if features is not None:
                    slots = (input_ids[0] == slot).nonzero()[:, 0]
                    embeddings = embeddings.index_copy(1, slots, features.to(embeddings.dtype))
                return super().forward(inputs_embeds=embeddings, **more)

        state = {name: tensor.to(dtype) for name, tensor in self._state().items()}
        config = transformers.Qwen2Config(
            **_qwen2(self.model.language), tie_word_embeddings="lm_head.weight" not in state
        )
        model, told = WithFeatures.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
        return model.eval()

    def _state(self) -> dict[str, Tensor]:
        """Return the weights under the names of Qwen2's class."""
        source, state = self.one.source, {}
        for name, theirs in _REST.items():
            if name in source:
                state[theirs] = source.get(name)
        for layer in range(self.model.language.num_layers):
            at, there = f"transformer.h.{layer}.", f"model.layers.{layer}."
            for norm, theirs in _NORMS.items():
                state[f"{there}{theirs}.weight"] = source.get(f"{at}{norm}.weight")
            for linear, parts in _LINEAR.items():
                for kind in ("weight", "bias"):
                    if (name := f"{at}{linear}.{kind}") in source:
                        for part, tensor in zip(parts, source.get(name).chunk(len(parts)), strict=True):
                            state[f"{there}{part}.{kind}"] = tensor.contiguous()
        return state

    def config_file(self, quantization: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``config.json``: what its own code asks for the number type is said as in the published one."""
        own = json.loads((self.one.source.directory / CONFIG).read_text(encoding="utf-8"))
        own.pop("dtype", None)
        numbers = {"bf16": False, "fp16": True, "fp32": False, "torch_dtype": "float16"}
        return {**own, **numbers, "quantization_config": dict(quantization)}


def _check_room(tensor: Tensor, where: str) -> None:
    """Check that :data:`DTYPE` has room for all values; only rounding is what a narrower type is.

    Raises:
        UserError: it has not, or they are not finite.
    """
    check_finite(tensor, where)
    largest, most = float(tensor.abs().max()), torch.finfo(DTYPE).max
    if largest > most:
        raise UserError(
            f"{where}: its largest value {largest:g} would be infinite in float16, which ends at {most:g} and which "
            "this layout's kernels compute in; int4 cannot write it"
        )


def _qwen2(language: LanguageConfig) -> dict[str, Any]:
    """Return the keys of ``Qwen2Config``."""
    return {
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_attention_heads,
        "head_dim": language.kv_channels,
        "max_position_embeddings": language.max_position_embeddings,
        "rms_norm_eps": language.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(language.rotary_base)},
        "use_sliding_window": False,
        "eos_token_id": None,
        "bos_token_id": None,
    }


class UnderQwensNames:
    """What the library wrote of a Qwen2, under the names of ``modeling_qwen.py``.

    Args:
        found: with ``model.layers.N.self_attn.q_proj.qweight`` and so on.
        biases: give each layer of 4 bits a bias, of zeros if need be, as AutoGPTQ does.
    """

    def __init__(self, found: Source, *, biases: bool) -> None:
        self._found = found
        self._parts: dict[str, tuple[str, ...]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        layers = {int(match[1]) for name in found.tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))}
        for layer in sorted(layers):
            at, there = f"transformer.h.{layer}.", f"model.layers.{layer}."
            for norm, theirs in _NORMS.items():
                self._add(f"{at}{norm}.weight", (f"{there}{theirs}.weight",))
            for linear, parts in _LINEAR.items():
                stems = tuple(there + part for part in parts)
                for ending in (*_PACKED, "bias"):
                    self._add(f"{at}{linear}.{ending}", tuple(f"{stem}.{ending}" for stem in stems))
                self._add(f"{at}{linear}.g_idx", (f"{stems[0]}.g_idx",))
                if biases and f"{at}{linear}.bias" not in self.tensors:
                    out = self.shape(f"{at}{linear}.scales")[-1]
                    self.tensors[f"{at}{linear}.bias"] = TensorInfo((out,), DTYPE, self._file(f"{at}{linear}.scales"))

    def _add(self, name: str, parts: tuple[str, ...]) -> None:
        if parts[0] in self._found:
            infos = [self._found.tensors[part] for part in parts]
            out = sum(info.shape[-1] for info in infos)
            self._parts[name] = parts
            self.tensors[name] = TensorInfo((*infos[0].shape[:-1], out), infos[0].dtype, infos[0].file)

    def _file(self, name: str) -> Path:
        return self.tensors[name].file

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @staticmethod
    def layers_of(layers: int) -> int:
        """Return how many linear layers there are here, of so many of Qwen2's class."""
        return layers * len(_LINEAR) // sum(map(len, _LINEAR.values()))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.tensors[name].shape

    def get(self, name: str) -> Tensor:
        """Return a tensor."""
        if name not in self._parts:
            return torch.zeros(self.shape(name), dtype=DTYPE)
        return torch.cat([self._found.get(part) for part in self._parts[name]], dim=-1)


def quantization_config(layout: str, bits: int, group_size: int) -> dict[str, Any]:
    """Return what ``config.json`` says of the weights: AutoGPTQ's keys and values as published, or AutoAWQ's.

    ``damp_percent`` and ``true_sequential`` are of GPTQ's own search; nothing that loads weights reads them.
    """
    if layout == "awq":
        names = ["visual", "mm_projector", "vision_tower", "lm_head"]
        return {
            "quant_method": "awq", "bits": bits, "group_size": group_size, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": names,
        }  # fmt: skip
    return {
        "bits": bits,
        "group_size": group_size,
        "damp_percent": 0.01,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
    }


def own_file(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return :data:`QUANTIZE_CONFIG`."""
    return {key: value for key, value in quantization.items() if key != "quant_method"}
