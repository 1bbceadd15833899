"""Latent attention: what does not go with it is refused by key. Its numbers: tests/families/test_text_kinds.py."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_recipe

from megavlm.config.checks import check_recipe
from megavlm.config.errors import UserError
from megavlm.families.deepseek_v2 import part_of

LANGUAGE: dict[str, Any] = {
    "preset": "deepseek_v2", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4,
    "num_query_groups": 4, "kv_channels": 24, "v_head_dim": 20, "kv_lora_rank": 40, "vocab_size": 512,
    "max_position_embeddings": 2048, "num_moe_experts": None, "moe_router_topk": 2, "moe_router_pre_softmax": False,
}  # fmt: skip


def refused(language: dict[str, Any], **branches: Any) -> str:
    """Return the message that such a recipe is refused with."""
    with pytest.raises(UserError) as error:
        check_recipe(tiny_recipe(model={"preset": "tiny", "language": {**LANGUAGE, **language}}, **branches))
    return str(error.value)


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ({"v_head_dim": None}, "kv_lora_rank: needs model.language.v_head_dim"),
        ({"v_head_dim": 25}, "v_head_dim: 25 is more than model.language.kv_channels (24)"),
        ({"rotary_percent": 1.0}, "rotary_percent: 1 of 24 channels are 24; with model.language.kv_lora_rank some"),
        ({"num_query_groups": 2}, "num_query_groups: 2, but with model.language.kv_lora_rank each of the 4 heads"),
        ({"qk_layernorm": True}, "kv_lora_rank: goes with model.language.qk_layernorm false"),
        ({"sliding_window": 8}, "kv_lora_rank: goes with model.language.sliding_window null"),
        ({"attention_mask": "prefix"}, "kv_lora_rank: goes with model.language.attention_mask causal"),
        ({"kv_lora_rank": None}, "v_head_dim: has no effect without model.language.kv_lora_rank"),
    ],
)
def test_what_does_not_go_with_a_latent_is_refused(language: dict[str, Any], words: str) -> None:
    assert words in refused(language)


def test_what_is_not_proven_with_a_latent_is_refused() -> None:
    """By the keys of other branches."""
    lora = {"rank": 4, "targets": ("kv_b_proj",), "quantize": "nf4"}
    beside = {"vision": {"freeze": True}, "connector": {"freeze": True}}
    message = refused({}, lora=lora, modules=beside, checkpoint={"load": "."})
    assert "lora.quantize: weights of latent attention are not kept in 4 bits" in message
    message = refused({}, engine={"tp_comm_overlap": True})
    assert "engine.tp_comm_overlap: has no buffers for the projections of latent attention" in message
    lora = {"rank": 4, "targets": ("kv_a_proj_with_mqa",)}
    message = refused({}, lora=lora, modules=beside, checkpoint={"load": "."})
    assert "'kv_a_proj_with_mqa' is none of the language model's layers" in message


@pytest.mark.parametrize("width", range(2, 300, 2))
def test_a_part_of_a_head_is_so_many_channels(width: int) -> None:
    for channels in range(2, width, 2):
        assert int(width * part_of(channels, width)) == channels
