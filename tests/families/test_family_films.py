"""A picture and a film beside each other: features, logits and gradients are those of Transformers' classes.

What frames there are, and of which size, is in ``tests/data/test_film_rules.py``; where positions lie in
``tests/data/test_own_positions.py``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import glm4v_models
import jinja2
import numpy as np
import pytest
import qwen2_vl_models
import qwen3_vl_models
import ranks
import torch
from film_cases import given, shown, write_film_reference
from film_maker import film, frame
from internvl_cases import compare
from internvl_models import internvl
from llava_next_models import llava_onevision
from native_cases import LAYOUT, convert
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration
from whole_rows import ROWS

from megavlm.checkpoint.distributed import load
from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.data.films.container import FRAME_RATE
from megavlm.data.films.plan import film_plan_of
from megavlm.data.media import arrange, plan_of
from megavlm.data.positions import own_grids
from megavlm.families.films import write_films
from megavlm.families.presets import expand_presets
from megavlm.inference.generate import generate
from megavlm.inference.prompt import Prompt
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups

MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[PreTrainedModel, Path], Path]]] = {
    "qwen2_vl": (qwen2_vl_models.qwen2_vl, qwen2_vl_models.save),
    "qwen2_5_vl": (qwen2_vl_models.qwen2_5_vl, qwen2_vl_models.save),
    "qwen3_vl": (qwen3_vl_models.qwen3_vl, qwen3_vl_models.save),
    "glm4v": (glm4v_models.glm4v, glm4v_models.save),
    "llava_onevision": (llava_onevision, lambda model, directory: (model.save_pretrained(directory), directory)[1]),
    "internvl": (internvl, lambda model, directory: (model.save_pretrained(directory), directory)[1]),
}
SIDE = ["model.video.positions_after=side"]
"""As Transformers 5.23 has it."""


def made(name: str, directory: Path) -> tuple[PreTrainedModel, list[str]]:
    """Write a model as it comes, and converted; return it, and the keys by which films are as in its class."""
    make, save = MODELS[name]
    model = make()
    save(model, directory / "hf")
    recipe = convert(directory / "hf", directory / "m")
    keys = SIDE if name.startswith("qwen2") else []
    assert recipe.model.video.kind == ("qwen2_vl" if name.startswith("qwen2") else name)
    if name in ("qwen3_vl", "glm4v"):
        keys += ["model.video.total_pixels=16384", "model.video.min_pixels=64"]
    if name in ("llava_onevision", "internvl"):
        keys += ["model.video.num_frames=3"]
    if name == "qwen2_5_vl":
        assert recipe.model.video.tokens_per_second == 4
    return model, keys


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.family(name)) for name in MODELS])
def test_features_logits_and_gradients(name: str, tmp_path: Path) -> None:
    model, keys = made(name, tmp_path)
    recipe = load_recipe(tmp_path / "m" / "recipe.yaml", keys, expand_presets)
    write_film_reference(model, recipe, tmp_path / "reference.safetensors")
    compare(str(tmp_path / "m"), str(tmp_path / "reference.safetensors"), keys)


@pytest.mark.long
@pytest.mark.family("qwen2_5_vl")
def test_at_four_ranks(tmp_path: Path) -> None:
    """TP 2 x PP 2 with sequence parallelism; three steps give the losses of one process."""
    model, keys = made("qwen2_5_vl", tmp_path)
    recipe = load_recipe(tmp_path / "m" / "recipe.yaml", keys, expand_presets)
    reference = tmp_path / "reference.safetensors"
    write_film_reference(model, recipe, reference)
    _, losses = compare(str(tmp_path / "m"), str(reference), keys)
    results = ranks.run(
        "internvl_cases:compare", str(tmp_path / "m"), str(reference), [*LAYOUT, *keys], world=4, timeout=600
    )
    for _, there in results:
        assert there == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.family(name)) for name in ("qwen2_5_vl", "qwen3_vl")]
)
def test_greedy_answers(name: str, tmp_path: Path) -> None:
    model, keys = made(name, tmp_path)
    recipe = load_recipe(tmp_path / "m" / "recipe.yaml", ["training.precision=fp32", *keys], expand_presets)
    ids, pixels, layouts = shown(recipe, picture=True)
    whole = model.generate(
        **given(model, ids, pixels, layouts), do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0
    )
    image = model.config.image_token_id
    with process_groups(recipe.parallel, 1):
        chunks = build_model(recipe, image)
        load(tmp_path / "m", modules=[unwrap(chunk) for chunk in chunks])
        own = torch.where(ids < 0, image, ids).numpy()
        prompt = Prompt(own, pixels, arrange(plan_of(recipe.model), layouts), own_grids(recipe.model, layouts))
        answers = generate(chunks, [prompt], max_new_tokens=8, stop_ids=[], vocab_size=128, pack_length=1024)
    assert answers == [whole[0, len(ids) :].tolist()]


@pytest.mark.family("qwen2_5_vl")
def test_positions_behind_a_film_matter(tmp_path: Path) -> None:
    """The film is long enough that what is published and what Transformers 5.3 has are not the same."""
    made("qwen2_5_vl", tmp_path)
    recipe = load_recipe(tmp_path / "m" / "recipe.yaml", [], expand_presets)
    _, _, layouts = shown(recipe, picture=True)
    grid = own_grids(recipe.model, layouts)[-1]
    assert int(grid.step * (grid.frames - 1)) + 1 > max(grid.rows, grid.columns)


@pytest.mark.family("qwen3_vl")
def test_the_processors_file_there_and_back(tmp_path: Path) -> None:
    model, _ = made("qwen3_vl", tmp_path)
    text = json.dumps({
        "size": {"longest_edge": 20000, "shortest_edge": 300}, "patch_size": 4, "temporal_patch_size": 2,
        "merge_size": 2, "fps": 3, "max_frames": 20, "video_processor_type": "Qwen3VLVideoProcessor",
    })  # fmt: skip
    assert model is not None
    (tmp_path / "hf" / "video_preprocessor_config.json").write_text(text)
    video = convert(tmp_path / "hf", tmp_path / "n").model.video
    assert (video.fps, video.max_frames, video.min_pixels, video.total_pixels) == (3, 20, 300, 20000)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.family(name)) for name in MODELS])
def test_what_was_trained_is_written_and_read_again(name: str, tmp_path: Path) -> None:
    """``video_preprocessor_config.json`` of an export after a training; the keys that it had stay."""
    make, save = MODELS[name]
    source = save(make(), tmp_path / "hf")
    recipe = convert(source, tmp_path / "m")
    kind = recipe.model.video.kind
    changed: dict[str, Any] = {"fps": 3.0}
    if kind in ("qwen2_vl", "qwen3_vl"):
        changed |= {"min_frames": 6, "max_frames": 40, "min_pixels": 128, "max_pixels": 64 * 90}
    if kind == "qwen2_vl":
        changed["total_pixels"] = 754_677  # which 0.9 times a count of tokens misses by one
    if kind != "qwen2_vl" and recipe.model.vision.packed:
        changed |= {"total_pixels": 64_000, "min_pixels": 128}
    if kind == "glm4v":
        changed["max_seconds"] = 20.0
    model = dataclasses.replace(recipe.model, video=dataclasses.replace(recipe.model.video, **changed))
    path = source / "video_preprocessor_config.json"
    path.write_text(json.dumps({"of_the_authors": 1}))
    assert write_films(source, model)
    told = json.loads(path.read_text())
    assert told["of_the_authors"] == 1 and told["do_sample_frames"] is True
    again = convert(source, tmp_path / "again").model
    assert film_plan_of(again) == film_plan_of(model)
    assert write_films(source, again) == []


@pytest.mark.family("qwen2_5_vl")
def test_generate_with_frames(tmp_path: Path) -> None:
    """``megavlm generate --video`` answers as Transformers does with the same frames, which need no resizing."""
    source = qwen2_vl_models.publish(tmp_path / "hf", qwen2_vl_models.qwen2_5_vl)
    only_words(source)
    convert(source, tmp_path / "m")
    frames = np.random.default_rng(3).integers(0, 255, (5, 24, 32, 3), dtype=np.uint8)
    (tmp_path / "film").mkdir()
    for number, pixels in enumerate(frames):
        Image.fromarray(pixels).save(tmp_path / "film" / f"{number:03d}.png")
    words = ["generate", str(tmp_path / "m"), "--video", str(tmp_path / "film"), "--prompt", "What is it?"]
    options = ["--max-new-tokens=8", "training.precision=fp32"]
    answer = ranks.megavlm([*words, *options, *SIDE], apart=True).stdout
    assert answer.strip() == their_answer(source, frames, "What is it?").strip() != ""
    other = ranks.megavlm([*words[:2], *words[4:], *options], apart=True).stdout
    assert other != answer


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.family(name), *([] if name == "qwen2_5_vl" else [pytest.mark.long])])
        for name in MODELS
    ],
)
def test_convert_check(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``--video``: a film's features, logits and answer, beside those of a picture and of none."""
    hf = ROWS[name].answers(tmp_path / "hf")  # type: ignore[operator]
    (tmp_path / "a.mp4").write_bytes(film(26, turn=90))
    Image.fromarray(frame(3)).save(tmp_path / "p.png")
    words = ["convert", "check", "--hf", hf, "--video", tmp_path / "a.mp4", "--image", tmp_path / "p.png"]
    with caplog.at_level("INFO"):
        assert main([*map(str, words), "--max-new-tokens=8"]) == 0, caplog.text
    assert "2: a.mp4" in caplog.text and caplog.text.count("greedy answers: equal") == 3
    assert caplog.text.count("image features none") == 1 and "all within the tolerance" in caplog.text
    assert ("model.video.positions_after=side" in caplog.text) == name.startswith("qwen2")
    if name == "qwen2_5_vl":
        assert main([*map(str, words[:-3]), str(tmp_path / "p.png")]) == 2  # a picture is no film


def only_words(directory: Path) -> None:
    """Let a saved model answer with whole characters only, so that answers can be told apart as text."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for token in range(model.config.text_config.vocab_size):
        if not tokenizer.decode([token]).isprintable() or "\ufffd" in tokenizer.decode([token]):
            model.lm_head.weight.data[token] = 0
    config = (directory / "config.json").read_bytes()
    model.save_pretrained(directory)
    (directory / "config.json").write_bytes(config)


def their_answer(directory: Path, frames: np.ndarray, question: str) -> str:
    """Return Transformers' greedy answer, the patches made by a reshape as in its video processor's ``patchify``."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, attn_implementation="eager").eval()
    told = json.loads((directory / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(told[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    film = (torch.from_numpy(frames).permute(0, 3, 1, 2) / 255 - mean) / std
    film = torch.cat([film, film[-1:]])  # an odd number
    steps, height, width = len(film) // 2, film.shape[2] // 4, film.shape[3] // 4
    patches = film.view(steps, 2, 3, height // 2, 2, 4, width // 2, 2, 4).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = jinja2.Template(template).render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
    text = text.replace("<|video_pad|>", "<|video_pad|>" * (steps * height * width // 4))
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)[None]
    whole = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=patches.reshape(-1, 96),
        video_grid_thw=torch.tensor([[steps, height, width]]), second_per_grid_ts=[2 / FRAME_RATE],
        mm_token_type_ids=2 * (ids == model.config.video_token_id).int(), do_sample=False, max_new_tokens=8,
        pad_token_id=0,
    )  # fmt: skip
    return str(tokenizer.decode(whole[0, ids.size(1) :].tolist()))
