"""Llama 3.2 Vision's image plan against Transformers' image processor, and what its family refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from mllama_models import FILES, mllama, save
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_all_supported_aspect_ratios,
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets
from megavlm.weights.source import Source


def preset() -> ModelConfig:
    return load_recipe("llama3_2_vision_11b/sft", [], expand_presets).model


@pytest.mark.family("mllama")
def test_the_plan_is_that_of_its_processor() -> None:
    """Canvas, size and number of the proportions of pictures small and large, wide and tall."""
    model = preset()
    plan, rng = plan_of(model), np.random.default_rng(3)
    sides = [1, 2, 559, 560, 561, 1119, 1120, 1121, 2240, 2241]
    sizes = [(a, b) for a in sides for b in sides] + [tuple(one) for one in rng.integers(1, 3000, (400, 2)).tolist()]
    seen = set()
    # Whose numbers are those of the tower's tables.
    assert list(model.vision.ratios) == get_all_supported_aspect_ratios(4)
    for width, height in sizes:
        if max(width, height) > 200 * min(width, height):
            continue
        layout = plan.plan(width, height)
        canvas = get_optimal_tiled_canvas(height, width, 4, 560)
        rows, columns = int(canvas[0]) // 560, int(canvas[1]) // 560
        fitted = get_image_size_fit_to_canvas(height, width, *map(int, canvas), 560)
        assert layout.grid == (rows, columns), (width, height)
        assert layout.canvases[0].resized == (int(fitted[1]), int(fitted[0])), (width, height)
        assert layout.tokens == 1 and plan.features_of(layout) == rows * columns * 1601
        assert model.vision.rows_of(layout.grids[0]) == plan.features_of(layout)
        seen.add(layout.grid)
    assert seen == set(model.vision.ratios)


@pytest.mark.family("mllama")
def test_what_its_family_cannot_hold() -> None:
    model, family = preset(), FAMILIES["mllama"]
    assert family.refusal(model) is None

    def with_language(**values: object) -> ModelConfig:
        return dataclasses.replace(model, language=dataclasses.replace(model.language, **values))

    assert "8 more" in str(family.refusal(with_language(vocab_size=128256)))
    assert "for which its configuration has no key" in str(family.refusal(with_language(kv_channels=64)))
    squashed = dataclasses.replace(model, image=dataclasses.replace(model.image, kind="squash"))
    assert "the image plan is squash" in str(family.refusal(squashed))
    assert "layers attend to pictures" in str(FAMILIES["llama"].refusal(model))


@pytest.mark.family("mllama")
def test_files_that_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "hf")
    config, pictures = tmp_path / "hf" / "config.json", tmp_path / "hf" / "preprocessor_config.json"
    whole = json.loads(config.read_text())

    def refused() -> str:
        assert main(["convert", "hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]) == 2
        assert not (tmp_path / "m").exists()
        return capsys.readouterr().err

    ratios = [[2, 1], [1, 1], [1, 2]]
    config.write_text(
        json.dumps({**whole, "vision_config": {**whole["vision_config"], "supported_aspect_ratios": ratios}})
    )
    assert "supported_aspect_ratios" in refused()
    config.write_text(json.dumps(whole))
    pictures.write_text(json.dumps({**FILES, "max_image_tiles": 6}))
    assert "max_image_tiles is 6" in refused()
    assert mllama().config.text_config.cross_attention_layers == [1, 3, 6]


@pytest.mark.family("mllama")
def test_what_its_files_leave_out_is_as_its_classes_have_it(tmp_path: Path) -> None:
    save(tmp_path)
    config, pictures = tmp_path / "config.json", tmp_path / "preprocessor_config.json"
    tree, left_out = json.loads(config.read_text()), ("image_mean", "image_std", "resample")
    tree["text_config"] |= {"cross_attention_layers": None, "rope_parameters": None}
    tree["vision_config"] |= {"intermediate_layers_indices": None, "vision_output_dim": None}
    config.write_text(json.dumps(tree))
    pictures.write_text(json.dumps({key: value for key, value in FILES.items() if key not in left_out}))
    found = FAMILIES["mllama"].branches(Source(tmp_path))
    language, vision, text = found["language"], found["vision"], MllamaTextConfig()
    assert language["cross_attention_layers"] == tuple(text.cross_attention_layers)
    assert language["rotary_base"] == text.rope_parameters["rope_theta"]
    assert vision["intermediate_layers"] == tuple(MllamaVisionConfig().intermediate_layers_indices)
    assert vision["image_mean"] == MllamaImageProcessorPil.image_mean
    assert vision["image_std"] == MllamaImageProcessorPil.image_std
