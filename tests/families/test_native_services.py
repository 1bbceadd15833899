"""Adapters, server, chat and scores, with the parts of each family of pictures of any size.

The parts are those of its tiny checkpoints; they learn by heart what two pictures show, so that an answer is right only
where the picture was seen, at its place and in its size.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import ranks
import yaml
from glm4v_models import GLM4V
from minicpm_v_models import MINICPM_V
from PIL import Image, ImageDraw
from qwen2_vl_models import QWEN2_VL
from qwen3_vl_models import QWEN3_VL
from rice_models import RICE
from run_data import RunData
from serving import serving

from megavlm.cli import main
from megavlm.config.help import to_tree
from megavlm.config.load import load_recipe
from megavlm.families.presets import expand_presets

MAKERS: dict[str, Callable[[Path], Path]] = {
    name: table[name][1]
    for table, name in (
        (QWEN2_VL, "qwen2_5_vl"), (QWEN3_VL, "qwen3_vl"), (GLM4V, "glm4v"), (RICE, "llava_onevision1_5"),
        (MINICPM_V, "minicpm_llama3_v_2_5"),
    )
}  # fmt: skip
QUESTION, AGAIN = "What is in the picture?", "And in this one?"
SHOWN = {"red": "A red disc, at the left.", "blue": "Two blue bars."}
WIDE = (
    "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
)  # fmt: skip
ADAPTERS = ("lora.rank=4", "lora.targets=[all-linear]", "modules.vision.freeze=true", "modules.connector.freeze=true")
STEPS = 100


@dataclass(frozen=True)
class Trained:
    """A model that knows what two pictures show."""

    recipe: Path
    run: Path
    pictures: Path
    records: Path


def draw(folder: Path) -> None:
    """A wide picture and a tall one."""
    folder.mkdir()
    red = Image.new("RGB", (72, 24), (235, 232, 224))
    ImageDraw.Draw(red).ellipse((4, 4, 22, 20), fill=(204, 40, 40))
    red.save(folder / "red.png")
    blue = Image.new("RGB", (32, 64), (20, 20, 30))
    ImageDraw.Draw(blue).rectangle((2, 4, 12, 60), fill=(60, 90, 220))
    ImageDraw.Draw(blue).rectangle((20, 4, 30, 60), fill=(60, 90, 220))
    blue.save(folder / "blue.png")


def conversations() -> list[dict[str, Any]]:
    """One picture, and both in turns, either first."""
    found = []
    for first, second in (("red", "blue"), ("blue", "red")):
        turns = [
            {"from": "user", "value": f"Picture 1: <img>{first}.png</img>\n{QUESTION}"},
            {"from": "assistant", "value": SHOWN[first]},
        ]
        more = [
            {"from": "user", "value": f"Picture 2: <img>{second}.png</img>\n{AGAIN}"},
            {"from": "assistant", "value": SHOWN[second]},
        ]
        found += [{"id": first, "conversations": turns}, {"id": f"{first}2", "conversations": turns + more}]
    return found


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.family(name)) for name in MAKERS])
def trained(request: pytest.FixtureRequest, run_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](root / "hf")
    assert main(["convert", "hf-to-megatron", "--hf", str(root / "hf"), "--out", str(root / "m")]) == 0
    model = to_tree(load_recipe(root / "m" / "recipe.yaml", [], expand_presets))["model"]
    # As large as 4 bits ask for: whole groups of blocks on each rank.
    sizes = {"hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 4}
    model["language"] |= {**sizes, "vocab_size": 512, "max_position_embeddings": 512, "init_method_std": 0.1}
    for part in ("vision", "connector"):
        model[part] |= {"init_method_std": 0.1}
    model |= {"template": "qwen_vl", "preset": None}
    draw(root / "pictures")
    records = conversations()
    (root / "records.json").write_text(json.dumps(records * 16))
    words = ["prepare", str(root / "records.json"), "--images", str(root / "pictures"), "--out", str(root / "data")]
    assert main(words) == 0
    tree = yaml.safe_load((run_data.root / "recipe.yaml").read_text())
    data = {"train": [{"path": str(root / "data")}], "validation": [], "sequence_length": 256}
    if model["image"]["kind"] == "slices":  # with words between them
        data["sequence_length"] = 512
    tree |= {"model": model, "data": {**tree["data"], **data}}
    tree["optimizer"] = {"lr": 2e-3, "warmup_steps": 10, "clip_grad": 1.0}
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    words = ["train", str(root / "recipe.yaml"), f"output_dir={root / 'run'}", f"training.train_steps={STEPS}"]
    ranks.megavlm(words, world=1, timeout=600)
    (root / "asked.json").write_text(json.dumps([one for one in records if not one["id"].endswith("2")]))
    return Trained(root / "recipe.yaml", root / "run", root / "pictures", root / "asked.json")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def content(picture: Path, text: str) -> list[dict[str, Any]]:
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]


@pytest.mark.long
def test_it_is_served_and_scored(trained: Trained, tmp_path: Path) -> None:
    """The server with its cache, a conversation that goes on with another picture, layouts, and one's own records."""
    assert losses(trained.run)[-1] < 0.05
    red, blue = (trained.pictures / f"{name}.png" for name in ("red", "blue"))
    with serving(trained.run, red, tmp_path / "log") as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=600)

        def ask(messages: list[dict[str, Any]], **more: Any) -> str:
            said = client.chat.completions.create(model="tiny", messages=messages, temperature=0, **more)
            return str(said.choices[0].message.content)

        for first, second in ((red, blue), (blue, red)):
            messages: list[dict[str, Any]] = [{"role": "user", "content": content(first, QUESTION)}]
            assert ask(messages) == SHOWN[first.stem]
            messages.append({"role": "assistant", "content": SHOWN[first.stem]})
            messages.append({"role": "user", "content": content(second, AGAIN)})
            assert ask(messages) == SHOWN[second.stem]
            pieces = client.chat.completions.create(model="tiny", messages=messages, temperature=0, stream=True)
            assert "".join(one.choices[0].delta.content or "" for one in pieces if one.choices) == SHOWN[second.stem]
    words = ["generate", str(trained.run), "--image", str(blue), "--prompt", QUESTION, "--max-new-tokens=24"]
    assert ranks.megavlm([*words, *WIDE], world=4, apart=True).stdout.strip() == SHOWN["blue"]
    out = tmp_path / "eval"
    words = ["eval", str(trained.run), "--data", str(trained.records), "--images", str(trained.pictures)]
    assert main([*words, "--out", str(out), "--max-new-tokens=24"]) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert scores["scores"] == {"exact_match": 100.0} and scores["records"] == 2


@pytest.mark.long
@pytest.mark.parametrize("quantize", ["null", "nf4"])
def test_adapters_are_trained_and_answer(trained: Trained, quantize: str, tmp_path: Path) -> None:
    """On four ranks from the trained weights, whole or in 4 bits; one process answers, and knows the pictures still."""
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    run = tmp_path / "run"
    layout = WIDE if quantize == "null" else ("parallel.pipeline_model_parallel_size=2",)
    words = ["train", str(trained.recipe), f"output_dir={run}", f"checkpoint.load={trained.run}", *ADAPTERS, *layout]
    more = ["training.train_steps=4", "training.precision=bf16", "optimizer.lr=1e-4", "optimizer.warmup_steps=0"]
    ranks.megavlm([*words, *more, f"lora.quantize={quantize}"], world=4 if layout is WIDE else 2, timeout=600)
    assert losses(run)[-1] < 0.5
    blue = trained.pictures / "blue.png"
    words = ["generate", str(run), "--image", str(blue), "--prompt", QUESTION, "--max-new-tokens=24"]
    one = ["parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1"]
    answer = ranks.megavlm([*words, *one, "parallel.sequence_parallel=false"], apart=True).stdout.strip()
    assert answer == SHOWN["blue"]
