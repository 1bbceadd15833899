"""TinyGPT-V as its authors' code reads it: MiniGPT-4's tower and Q-Former, two linear layers, and a changed Phi-2.

github.com/DLYuanGod/TinyGPT-V @ 83f6189b, ``modeling_phi.py`` and
``minigpt4/models/{base_model,minigpt4,minigpt_v2}.py``. In one directory::

    llm/                                Phi-2, its queries, keys and values in one (``query_key_value``), and tokenizer
    eva_vit_g.pth                       EVA01-g; the last of its layers is left out
    blip2_pretrained_flant5xxl.pth      BLIP-2's Q-Former, and the norm behind the tower
    any other .pth                      what was trained: llama_proj, llama_proj2, weights of norms, and adapters

Each layer of Phi-2 has norms of queries and keys (one weight for all heads), and an RMSNorm behind attention, which
Phi-2's own files lack: they begin as ones and zeros. What was trained counts before what is frozen, whose norms are
carried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from operator import methodcaller
from typing import Any, ClassVar

from megavlm.architectures.connectors.q_former.tables import TINYGPT_V_Q_FORMER
from megavlm.architectures.decoders.decoder.tables import TINYGPT_V_LANGUAGE, TINYGPT_V_NORMS, TINYGPT_V_REST
from megavlm.architectures.towers.vit.tables import EVA01_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.data.box_words import MINIGPT_V2_BOXES
from megavlm.families.common import expect
from megavlm.families.family import Tree, config_file
from megavlm.families.minigpt import ADAPTERS_ASIDE, MiniGPT4Family, no_eva01, stretched, told_of
from megavlm.families.phi import PHI
from megavlm.families.text import language_branch
from megavlm.families.text_kinds import TextKind
from megavlm.weights.kinds import EVA_TOWER, LANGUAGE, PROJECTION, Q_FORMER
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_MODEL, _HEAD = f"{LANGUAGE}/model.", f"{LANGUAGE}/lm_head."
_TRAINED = f"{PROJECTION}/llama_model.base_model.model.model."
"""What the names of the language model begin with in the file of what was trained: it is PEFT's."""


def _read(config: Mapping[str, Any], where: str) -> Tree:
    """Return ``model.language``: its code has the norms whatever ``qk_layernorm`` says."""
    return {**PHI.read(config, where), "qk_layernorm": True}


def _write(language: LanguageConfig) -> Tree:
    return {**PHI.write(language), "qk_layernorm": False}


KIND: TextKind = dataclasses.replace(
    PHI,
    title="TinyGPT-V's Phi-2",
    table=TINYGPT_V_LANGUAGE,
    read=_read,
    write=_write,
    fixed={**PHI.fixed, "qk_layernorm": True, "attention_branch_norm": True},
    templates=("tinygpt_v",),
    layer_names="phi_fused",
    in_transformers=False,
)


class TinyGPTVFamily(MiniGPT4Family):
    """TinyGPT-V of any stage."""

    name = "tinygpt_v"
    title = "TinyGPT-V in its authors' files, beside Phi-2"
    styles: ClassVar[Mapping[str, Mapping[str, str]]] = {"trained": {}, "start": {}}
    own_rotary = branch_norm = True
    finds = MINIGPT_V2_BOXES.asks  # its stage 4 is trained on MiniGPT-v2's data

    def detect(self, source: Source) -> bool:
        """By its files, and the language model."""
        pieces = source.pieces
        return EVA_TOWER in pieces and pieces[LANGUAGE].config.get("model_type") == "phi"

    def probe(self, style: str) -> str:
        """Return the last norm's weight."""
        return (_TRAINED if style == "trained" else _MODEL) + "final_layernorm.weight"

    def branches(self, source: Source) -> Tree:
        """Return all three branches; norms that no file has are made."""
        text = source.pieces[LANGUAGE]
        where = config_file(text)
        expect(text.config, where, model_type="phi")
        if Q_FORMER not in source.pieces:
            raise UserError(
                f"{source.path}: has no file of BLIP-2's Q-Former; put blip2_pretrained_flant5xxl.pth there"
            )
        language = language_branch(KIND, source, {**KIND.defaults, **text.config}, _HEAD, where)
        if f"{_MODEL}layers.0.self_attn.q_proj.weight" in source:
            raise UserError(
                f"{text.path}: queries, keys and values are in three tensors (q_proj), and TinyGPT-V's code reads one "
                "(query_key_value); put the Phi-2 there that its README.md names"
            )
        self._complete_norms(source, language)
        vision = self._vision(source)
        return {"vision": vision, "connector": self._connector(source, vision, language), "language": language}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the tables of all parts, that of the language model's trained norms among them."""
        connector = dataclasses.replace(TINYGPT_V_Q_FORMER, prefix=f"{Q_FORMER}/")
        files = {"projection": f"{PROJECTION}/", "minigpt": f"{PROJECTION}/"}
        tables = [
            dataclasses.replace(EVA01_VISION, prefix=f"{EVA_TOWER}/", names={"norm": self.norm}),
            dataclasses.replace(connector, names=files, aside=(*connector.aside, *ADAPTERS_ASIDE)),
        ]
        names = {"model": _MODEL, "head": _HEAD}
        if style == "start":
            return [*tables, dataclasses.replace(TINYGPT_V_LANGUAGE, names=names)]
        norms = dataclasses.replace(TINYGPT_V_NORMS, names={"model": _TRAINED})
        return [*tables, dataclasses.replace(TINYGPT_V_REST, names=names), norms]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return Phi-2's configuration: the others have none."""
        return KIND.write(model.language)

    def settings(self, model: ModelConfig) -> Tree:
        """Return what its code's own file of settings says of the model."""
        own = ("minigpt_v2", "pretrain") if stretched(model.vision) else ("minigpt4", "pretrain_vicuna0")
        return {"model": {"arch": own[0], "image_size": model.vision.image_size, "model_type": own[1]}}

    def templates(self, source: Source) -> tuple[str, ...]:
        """Return that of stages 3 and 4."""
        return ("tinygpt_v",)

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be the code's."""
        if model.image.kind != "squash":
            return f"the image plan is {model.image.kind}, TinyGPT-V squashes pictures"
        if getattr(model.connector, "projection_hidden_size", None) is None:
            return (
                "one linear layer stands behind the Q-Former (model.connector.projection_hidden_size), in TinyGPT-V two"
            )
        return no_eva01(model.vision) or self._no_connector(model) or KIND.refuses(model.language)

    def _vision(self, source: Source) -> Tree:
        """Return ``model.vision``: stage 4 stretches the tower's table to twice its sides."""
        vision = super()._vision(source)
        told = told_of(source)
        if told.get("arch") == "minigpt_v2" and "image_size" not in told:
            vision["image_size"] *= 2
        return vision

    def _connector(self, source: Source, vision: Mapping[str, Any], language: Mapping[str, Any]) -> Tree:
        """Return ``model.connector``; ``llama_proj2`` is begun where it is not there."""
        between = f"{PROJECTION}/llama_proj.weight"
        inside = source.shape(between)[0] if between in source else _BETWEEN
        found = super()._connector(source, vision, {"hidden_size": inside})
        if f"{PROJECTION}/llama_proj2.weight" not in source:
            bound, why = inside**-0.5, "as torch begins a linear layer, for stage 1"
            for kind, shape in (("weight", (language["hidden_size"], inside)), ("bias", (language["hidden_size"],))):
                name = f"{PROJECTION}/llama_proj2.{kind}"
                source.make(name, shape, why, methodcaller("uniform_", -bound, bound))
        return {**found, "projection_hidden_size": inside}

    def _complete_norms(self, source: Source, language: Mapping[str, Any]) -> None:
        """Make the norms that Phi-2 has not, where neither file has them."""
        weights = _TRAINED if self.probe("trained") in source else _MODEL
        width, head = language["hidden_size"], language["kv_channels"]
        make = partial(_made, source)
        for number in range(language["num_layers"]):
            layer = f"layers.{number}."
            for which in "qk":
                make(f"{weights}{layer}self_attn.{which}_layernorm.weight", head, 1.0)
                make(f"{_MODEL}{layer}self_attn.{which}_layernorm.bias", head, 0.0)
            make(f"{weights}{layer}post_layernorm.weight", width, 1.0)


_BETWEEN = 4096
"""Width between both linear layers."""


def _made(source: Source, name: str, width: int, value: float) -> None:
    if name not in source:
        why = f"{'ones' if value else 'zeros'}, as TinyGPT-V's code begins norms that Phi-2 has not"
        source.make(name, (width,), why, methodcaller("fill_", value))
