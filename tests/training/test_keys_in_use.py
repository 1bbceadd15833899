"""Keys that no other test calls by name do what their text says."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from run_data import RunData
from samples import build, losses, pack, recipe, sample
from tiny import tiny_recipe

from megavlm.architectures.context import BuildContext
from megavlm.cli import main
from megavlm.config.architecture import architecture_of
from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError
from megavlm.data.decode import PilDecoder
from megavlm.parallel.state import process_groups


def test_pre_layernorm_is_the_norm_in_front_of_the_towers_layers() -> None:
    with process_groups(recipe().parallel, 1):
        found = {}
        for norm in (True, False):
            vision = recipe(vision={"pre_layernorm": norm}).model.vision
            found[norm] = architecture_of(recipe().model, "vision").make(vision, BuildContext(recipe().parallel))
        with_norm, without = found[True], found[False]
        own = {name: value for name, value in with_norm.state_dict().items() if not name.startswith("ln_pre.")}
        assert set(own) == set(without.state_dict()) and len(own) < len(with_norm.state_dict())
        without.load_state_dict(own)
        pictures = torch.rand(2, 3, 32, 32)
        assert not torch.allclose(with_norm(pictures), without(pictures), atol=1e-3)
        with_norm.ln_pre = torch.nn.Identity()
        assert torch.equal(with_norm(pictures), without(pictures))


def test_add_qkv_bias_is_the_bias_of_queries_keys_and_values() -> None:
    batch = pack([sample(1, 40, images=1)])
    with process_groups(recipe().parallel, 1):
        models = {bias: build(language={"add_qkv_bias": bias}) for bias in (True, False)}
        ends = "self_attention.linear_qkv.bias"
        biases, none = (
            [name for name, _ in models[bias].language.named_parameters(prefix="language") if name.endswith(ends)]
            for bias in (True, False)
        )
        assert len(biases) == 2 and none == []
        models[False].load_state_dict(
            {name: value for name, value in models[True].state_dict().items() if name not in biases}, strict=False
        )
        before = losses(models[True], batch)  # biases begin at zero
        assert torch.equal(before, losses(models[False], batch))
        with torch.no_grad():
            for name in biases:
                models[True].get_parameter(name).add_(0.5)
        assert not torch.allclose(losses(models[True], batch), before, atol=1e-3)


@pytest.mark.parametrize(
    ("names", "own", "other"), [("qwen", ["c_attn", "w1"], ["q_proj"]), ("llama", ["q_proj", "up_proj"], ["c_attn"])]
)
def test_layer_names_are_those_of_lora_targets(names: str, own: list[str], other: list[str]) -> None:
    def adapted(targets: list[str]) -> Any:
        return tiny_recipe(
            model={"preset": "tiny", "language": {"layer_names": names}},
            lora={"rank": 4, "targets": targets},
            checkpoint={"load": "."},
            data={"train": [{"path": "."}], "tokenizer": __file__, "sequence_length": 96},
        )

    check_recipe(adapted(own))
    with pytest.raises(RecipeError, match=f"lora.targets: '{other[0]}' is none of the language model's layers"):
        check_recipe(adapted([*own, *other]))


def fed(words: list[str]) -> list[tuple[str, int]]:
    """Train; return the decoder of what reads ahead, and how many packs it does."""
    from megavlm.training import loop

    seen = []

    class Seen(loop.Prefetcher):
        def __init__(self, source: Any, decoder: Any, *rest: Any, depth: int, **more: Any) -> None:
            super().__init__(source, decoder, *rest, depth=depth, **more)
            seen.append((type(decoder).__name__, self._queue.maxsize))

    loop.Prefetcher = Seen  # type: ignore[misc]
    assert main(words) == 0
    return seen


def test_image_decoder_and_prefetch_steps_are_those_of_the_feed(run_data: RunData, tmp_path: Any) -> None:
    keys = ("data.image_decoder=pil", "data.prefetch_steps=3", "training.train_steps=1", "optimizer.warmup_steps=0")
    (seen,) = ranks.run(fed, run_data.words(tmp_path / "run", *keys))
    assert seen == [(PilDecoder.__name__, 3 * 2)]  # two micro-batches a step
