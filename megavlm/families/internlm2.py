"""InternLM2 and InternLM2.5: a Llama whose queries, keys and values lie in one matrix, group by group.

The keys are those of internlm/internlm2-7b's ``configuration_internlm2.py``; Transformers has no class for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megavlm.architectures.decoders.decoder.tables import INTERNLM2_LANGUAGE
from megavlm.config.schema import LanguageConfig
from megavlm.families.common import expect
from megavlm.families.family import Tree
from megavlm.families.text_kinds import TextFamily, TextKind, own_code, own_scaling, shape, shape_config


def _read(config: Mapping[str, Any], where: str) -> Tree:
    expect(config, where, model_type="internlm2", hidden_act="silu", bias=False, pretraining_tp=1)
    tree = dict(config)
    scaling = tree.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("type", scaling.get("rope_type")) == "dynamic":
        tree["rope_scaling"] = None  # dynamic NTK changes nothing up to max_position_embeddings
    return shape(tree, where, "internlm2")


def _write(language: LanguageConfig) -> Tree:
    tree = shape_config(language, "internlm2", "InternLM2ForCausalLM")
    del tree["rope_parameters"]  # its own code knows the two older keys alone
    return {
        **tree,
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": False,
        "hidden_act": "silu",
        "rope_scaling": own_scaling(language),
    }


INTERNLM2 = TextKind(
    model_type="internlm2",
    title="InternLM2",
    table=INTERNLM2_LANGUAGE,
    read=_read,
    write=_write,
    fixed={},
    narrow=own_code,
    templates=("internvl2_5",),
    layer_names="internlm2",
    in_transformers=False,
)


class InternLM2Family(TextFamily):
    """InternLM2 alone."""

    name = "internlm2"
    title = "InternLM2, InternLM2.5 language models"
    kind = INTERNLM2
