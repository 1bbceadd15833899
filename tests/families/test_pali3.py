"""PaLI-3, small: a SigLIP tower and a T5 learn the same at two layouts, and checkpoints go from one to the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ranks
import sentencepiece
from run_data import RunData
from trained_only import PARTS

from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError, UserError
from megavlm.inference.checkpoint import load_for_inference

pytestmark = pytest.mark.family("pali3", parts=PARTS["pali3"])

SMALL = (
    "model.vision={preset: siglip_vit, image_size: 32, patch_size: 8, hidden_size: 48, num_layers: 2, "
    "num_attention_heads: 4, ffn_hidden_size: 96, positional_grid: 4, init_method_std: 0.1}",
    "model.connector={preset: linear}",
    "model.language={preset: tiny_t5, hidden_size: 64, ffn_hidden_size: 96, kv_channels: 16}",
    "model.template=pali3", "modules.vision.freeze=false", "modules.connector.freeze=false",
    "modules.language.freeze=false", "optimizer.schedule=constant", "data.balance_images=false",
    "checkpoint.save_interval=3",
)  # fmt: skip
LAYOUT = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")


def tokenizer(data: RunData, path: Path) -> str:
    """Write a tokenizer with T5's control tokens; return the key that names it."""
    texts = [str(turn["value"]) for one in json.loads(data.heldout_json.read_text()) for turn in one["conversations"]]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts), model_writer=file, model_type="bpe", vocab_size=440, hard_vocab_limit=False,
            byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    return f"data.tokenizer={path}"


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.long
def test_steps_at_two_layouts_and_back(run_data: RunData, tmp_path: Path) -> None:
    own = (*SMALL, tokenizer(run_data, tmp_path / "t5.model"), "training.validation_interval=3")

    def train(run: str, steps: int, world: int, *layout: str) -> list[float]:
        words = run_data.words(tmp_path / run, *own, *layout, f"training.train_steps={steps}")
        ranks.megavlm(words, world=world)
        return losses(tmp_path / run)

    train("one", 3, 1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")  # weights begin otherwise at another layout
    one, two = train("one", 9, 1), train("two", 6, 2, *LAYOUT, "parallel.overlap_grad_reduce=true")
    assert len(one) == 9 and one[0] > one[8]
    assert two == pytest.approx(one[:6], rel=1e-4)
    assert train("two", 9, 1, "parallel.recompute_granularity=full") == pytest.approx(one, rel=1e-4)
    with pytest.raises(UserError, match=r"model.language.preset: tiny_t5 is an encoder-decoder, which is trained here"):
        load_for_inference(tmp_path / "two", [])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["parallel.pipeline_model_parallel_size=2"], "an encoder and a decoder are not cut into stages"),
        (["parallel.context_parallel_size=2"], "an encoder-decoder's packs are not cut over ranks"),
        (["parallel.tensor_model_parallel_size=3"], "model.language.num_attention_heads: 4 is not divisible"),
        (["model.language.relative_farthest=16"], "model.language.relative_farthest: 16 is no more than the distances"),
        (["data.balance_images=true"], "data.balance_images: orders packs by their cost"),
        (["logging.panel_interval=3"], "logging.panel_interval: does not go with an encoder-decoder"),
        (["engine.tp_comm_overlap=true"], "engine.tp_comm_overlap: does not go with an encoder-decoder"),
        (["engine.cuda_graph_impl=transformer_engine"], "engine.cuda_graph_impl: does not go with an encoder-decoder"),
        (["engine.bias_activation_fusion=on"], "engine.bias_activation_fusion: does not go with an encoder-decoder"),
        (["engine.apply_rope_fusion=on"], "by one position, and an encoder-decoder's are not turned"),
        (["engine.fp8=hybrid"], "FP8 is not known to fit the encoder_decoder architecture"),
        (["lora.rank=8", "lora.targets=[q]"], "'tiny_t5' is of an architecture that names no layers for adapters"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(words: list[str], expected: str, run_data: RunData) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(run_data.recipe(Path("run"), *SMALL, *words))
    assert expected in str(caught.value)
