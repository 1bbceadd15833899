"""The recipes that train adapters: their numbers, and how much learns at full size."""

from __future__ import annotations

import pytest
import torch

from megavlm.architectures.adapters import is_adapter
from megavlm.architectures.context import BuildContext
from megavlm.config.architecture import LANGUAGE
from megavlm.config.checks import check_recipe
from megavlm.config.load import load_recipe
from megavlm.config.schema import ParallelConfig
from megavlm.families.presets import expand_presets
from megavlm.parallel.state import process_groups

QWEN_VL = (64, 16.0, 0.05, ("c_attn", "attn.c_proj", "w1", "w2"))
# Facts page E, and the parameters of adapters by hand: rank x (in + out) of each target, times the layers.
RECIPES = {
    "qwen_vl_7b/lora": (*QWEN_VL, 64 * (4 * 4096 + 2 * 4096 + 2 * (4096 + 11008)) * 32),
    "qwen_vl_7b/qlora": (*QWEN_VL, 64 * (4 * 4096 + 2 * 4096 + 2 * (4096 + 11008)) * 32),
    "codefuse_vl_14b/sft": (
        16, 64.0, 0.05, ("c_attn", "c_proj", "w1", "w2"), 16 * (4 * 5120 + 2 * 5120 + 3 * (5120 + 13696)) * 40,
    ),
    # Beside the weights of text alone.
    **{
        f"cogvlm_base_{side}/lora": (
            10, 1.0, 0.0, ("language_expert_query_key_value", "language_expert_dense"), 10 * (4 * 4096 + 2 * 4096) * 32
        )
        for side in (224, 490)
    },
    "quickstart_lora": (
        8, 16.0, 0.05, ("c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"),
        8 * (4 * 128 + 2 * 128 + 3 * (128 + 352)) * 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_and_size(name: str) -> None:
    recipe, (rank, alpha, dropout, targets, size) = load_recipe(name, [], expand_presets), RECIPES[name]
    check_recipe(recipe, 8)
    lora = recipe.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (rank, alpha, dropout, targets)
    assert recipe.modules.vision.freeze and recipe.modules.connector.freeze and not recipe.modules.language.freeze
    assert (lora.train_embeddings, lora.train_head) == (name == "qwen_vl_7b/lora",) * 2  # the base model's recipe
    assert lora.quantize == ("nf4" if name.endswith("qlora") else None)
    if name.startswith("qwen"):
        optimizer = recipe.optimizer
        assert (optimizer.lr, optimizer.weight_decay, optimizer.adam_beta2) == (1e-5, 0.1, 0.95)
        assert recipe.training.global_batch_size == 128 and recipe.data.sequence_length == 2048
        assert optimizer.warmup_steps == 0.01 * recipe.training.train_steps
    language = recipe.model.language
    with process_groups(ParallelConfig(), 1), torch.device("meta"):
        context = BuildContext(ParallelConfig(), torch.bfloat16, initialize=False, lora=lora)
        model = LANGUAGE.find(language.preset).build(language, context)
    assert sum(p.numel() for key, p in model.named_parameters() if is_adapter(key)) == size
