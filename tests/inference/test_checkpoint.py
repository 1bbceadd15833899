"""Which recipe a job without training runs a checkpoint by."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_data import RunData

from megavlm.config.checks import check_recipe
from megavlm.config.experts import experts_span_replicas
from megavlm.config.help import to_yaml
from megavlm.inference.checkpoint import recipe_at_layout

EXPERTS = (
    "model.language={preset: qwen3_moe, hidden_size: 64, ffn_hidden_size: 96, num_layers: 2, vocab_size: 512, "
    "num_attention_heads: 4, num_query_groups: 2, kv_channels: 16, max_position_embeddings: 2048, "
    "num_moe_experts: 4, moe_router_topk: 2, moe_ffn_hidden_size: 40, moe_layer_freq: 1}"
)


def test_a_run_with_panels_answers_where_replicas_share_experts(
    run_data: RunData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks had a pack in halves, and share experts; to answer they are replicas, which no panel goes with."""
    recipe = run_data.recipe(
        tmp_path, EXPERTS, "parallel.context_parallel_size=2", "parallel.expert_model_parallel_size=2",
        "logging.panel_interval=2",
    )  # fmt: skip
    check_recipe(recipe, 2)
    assert not experts_span_replicas(recipe.parallel)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe), "utf-8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = recipe_at_layout(tmp_path, ())
    assert experts_span_replicas(found.parallel) and found.logging.panel_interval is None
