"""Chameleon's codes in shards: prepared once, read in the place of pixels, predicted, and refused where they are
others."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import yaml
from chameleon_models import CODES, FILES, IMAGE, SIDE, ChameleonSource, chameleon
from safetensors.torch import load_file, save_file
from tokenizer_files import write_qwen2
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText
from whole import Shown
from whole_source import photographs, write_reference

from megavlm.cli import main
from megavlm.config.checks import check_recipe
from megavlm.config.errors import UserError
from megavlm.config.load import load_recipe
from megavlm.config.schema import ModelConfig, Recipe
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.codes import CARD, check_codes, picture_tokens, read_card
from megavlm.data.energon_dataset import PackEncoder, RawSample
from megavlm.data.media import plan_kinds, plan_of
from megavlm.data.shard_reader import open_shards
from megavlm.data.tokenizer import tokenizer_of
from megavlm.families.presets import expand_presets

pytestmark = pytest.mark.family("chameleon")

LAYOUT = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
]
SPECIAL = ("<s>", "</s>", "<reserved08706>", "<racm3:break>", "<eoss>", "<image>")
PER_PICTURE = (SIDE // 4) ** 2


@dataclass(frozen=True)
class Made:
    """A tiny checkpoint with its tokenizer, and data with its codes."""

    root: Path
    first: int
    """Token of code 0."""

    def words(self, output: str, data: str, *more: str) -> list[str]:
        """Return the arguments of ``megavlm train``."""
        return [
            "train", str(self.root / "recipe.yaml"), f"output_dir={self.root / output}",
            f"data.train.0.path={self.root / data}", *more,
        ]  # fmt: skip

    def recipe(self, *more: str) -> Recipe:
        """Return the recipe itself."""
        return load_recipe(self.root / "recipe.yaml", list(more), expand_presets)


def records(root: Path) -> None:
    """Write pictures, and records of which some show two, and some none; and one whose answer is a picture."""
    rows: list[dict[str, Any]] = []
    for number, picture in enumerate(photographs([(20 + number, 40) for number in range(12)])):
        picture.save(root / f"{number}.png")
        shown = f"<img>{number}.png</img>" * (1 + (number == 3)) if number % 4 else ""
        turns = [
            {"from": "user", "value": f"{shown}what is {number}"},
            {"from": "assistant", "value": f"it is {number}"},
        ]
        rows.append({"conversations": turns})
    (root / "rows.json").write_text(json.dumps(rows))
    answer = [{"from": "user", "value": "draw"}, {"from": "assistant", "value": "see <img>1.png</img>"}]
    (root / "draws.json").write_text(json.dumps([*rows, {"conversations": answer}]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("codes")
    hf = root / "hf"
    hf.mkdir()
    names = list(NAMES_ONLY)
    path = write_qwen2(hf, added=SPECIAL, plain=names)
    ids = {one["content"]: one["id"] for one in json.loads(path.read_text())["added_tokens"]}
    chameleon(first=ids[names[0]], image=ids["<image>"]).save_pretrained(hf)
    (hf / "preprocessor_config.json").write_text(json.dumps(FILES))
    assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(root / "m")]) == 0
    records(root)
    prepared(root, "pixels")
    prepared(root, "codes", "--image-codes", str(root / "m"), "--codes-only")
    tree = yaml.safe_load((root / "m" / "recipe.yaml").read_text())
    own = {"model": tree["model"], **yaml.safe_load(RUN.format(root=root))}
    (root / "recipe.yaml").write_text(yaml.safe_dump(own))
    return Made(root, ids[names[0]])


NAMES_ONLY = ["IMGIMG" + "".join("ABCDEFGHIJ"[int(one)] for one in str(code)) + "Z" for code in range(CODES)]
RUN = """
output_dir: {root}/run
data:
  train: [{{path: {root}/pixels}}]
  tokenizer: {root}/hf/tokenizer.json
  image_decoder: pil
  sequence_length: 128
  num_workers: 0
  packing_buffer_size: 8
  balance_images: false
  shuffle_buffer_size: 8
optimizer: {{lr: 2e-3}}
training: {{train_steps: 2, global_batch_size: 2, precision: fp32}}
checkpoint: {{load: {root}/m}}
logging: {{log_interval: 1}}
"""


def prepared(root: Path, name: str, *words: str, source: str = "rows.json") -> Path:
    """Run ``megavlm prepare``."""
    assert main(["prepare", str(root / source), "--out", str(root / name), *words]) == 0
    return root / name


def members(directory: Path) -> dict[str, bytes]:
    """Return all codes of a data set, by key and number."""
    reader = open_shards(str(directory))
    rows = [reader[number] for number in range(len(reader))]
    return {f"{one['__key__']}.{k}": v for one in rows for k, v in one.items() if k.startswith("codes")}


def losses(made: Made, run: str) -> list[float]:
    lines = (made.root / run / "metrics.jsonl").read_text().splitlines()
    return [one["loss"] for one in map(json.loads, lines) if "loss" in one]


def test_codes_are_those_of_transformers_however_they_are_made(made: Made) -> None:
    """Beside pictures, in other shards, with other threads: the same bytes; and no pictures with --codes-only."""
    beside = made.root / "beside"  # in a process of its own, which nothing has prepared for Megatron-Core
    words = ["prepare", made.root / "rows.json", "--out", beside, "--image-codes", made.root / "m"]
    ranks.megavlm([*words, "--samples-per-shard", "5"], apart=True, env={"OMP_NUM_THREADS": "2"})
    found = members(made.root / "codes")
    assert members(beside) == found and len(found) == 10
    one, other = read_card(made.root / "codes"), read_card(beside)
    assert one is not None and other == replace(one, pictures=True) and not one.pictures
    files = {name for number in (0, 3) for name in open_shards(str(made.root / "codes"))[number]}
    assert not any(name.startswith("img") for name in files)
    processor = AutoImageProcessor.from_pretrained(made.root / "hf", backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(made.root / "hf", dtype=torch.float32)
    for number in (1, 11):
        pixels = processor(photographs([(20 + n, 40) for n in range(12)])[number], return_tensors="pt")["pixel_values"]
        expected = model.model.get_image_tokens(torch.as_tensor(pixels)).flatten() - made.first
        key = next(key for key in found if f"-{number:08d}." in key)
        codes = np.frombuffer(found[key], "<i2")
        assert codes.tolist() == expected.tolist() and len(set(codes.tolist())) > 3


@pytest.mark.dist
def test_training_from_codes_is_training_from_pixels(made: Made) -> None:
    for run in ("pixels", "codes"):
        ranks.megavlm(made.words(f"run-{run}", run), world=1)
    assert losses(made, "run-codes") == losses(made, "run-pixels") and len(losses(made, "run-codes")) == 2


@pytest.mark.dist
@pytest.mark.long
def test_the_same_cut_over_ranks(made: Made) -> None:
    """At TP 2 x PP 2 + SP, to the bit; with tokens of pictures predicted as well, there and at CP 2."""
    for run in ("pixels", "codes"):
        ranks.megavlm(made.words(f"cut-{run}", run, *LAYOUT), world=4)
    assert losses(made, "cut-codes") == losses(made, "cut-pixels") and len(losses(made, "cut-codes")) == 2
    predicted = {"one": ([], 1), "four": (LAYOUT, 4), "context": (["parallel.context_parallel_size=2"], 2)}
    for run, (layout, world) in predicted.items():
        ranks.megavlm(made.words(f"said-{run}", "codes", "loss.image_tokens=1", *layout), world=world)
    one = losses(made, "said-one")
    assert abs(one[0] - losses(made, "cut-codes")[0]) > 0.01
    assert losses(made, "said-four") == pytest.approx(one, rel=1e-5)
    assert losses(made, "said-context") == pytest.approx(one, rel=1e-5)


class SayingSource(ChameleonSource):
    """Transformers' class, whose logits of pictures' tokens are not masked; the samples hold these tokens."""

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Return what Transformers makes of the pixels in their places."""
        sample = super().shown(model, sizes, words)
        ids = sample.ids.clone()
        if sizes:
            with torch.no_grad():
                ids[ids == IMAGE] = self.model.model.get_image_tokens(sample.given["pixel_values"]).flatten().long()
        return Shown(ids, {}, torch.zeros(0, *plan_of(model).row), torch.zeros(0, 2, dtype=torch.long), [])

    def features(self, sample: Shown) -> Tensor:
        """Return none: they are among the tokens."""
        return torch.zeros(0, 1)

    def logits(self, sample: Shown) -> Tensor:
        """Run the model without what its class does to its logits at the end."""
        hidden = self.model.model(input_ids=sample.ids[None]).last_hidden_state
        found: Tensor = self.model.lm_head(hidden)[0]
        return found


@pytest.mark.dist
@pytest.mark.long
@pytest.mark.parametrize("behind", [False, True], ids=["7b", "34b"])
def test_predicted_tokens_of_pictures_are_those_of_transformers(behind: bool, tmp_path: Path) -> None:
    """Logits, losses and gradients, with text answers that hold none; at one process and TP 2 x PP 2 + SP."""
    source, reference = SayingSource(behind=behind), tmp_path / "reference.safetensors"
    (tmp_path / "hf").mkdir()
    source.save(tmp_path / "hf")
    assert main(["convert", "hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]) == 0
    recipe = load_recipe(tmp_path / "m" / "recipe.yaml", ["data.train.0.path=x", "data.tokenizer=x"], expand_presets)
    write_reference(source, "chameleon", recipe, reference)
    wanted = load_file(reference)
    for layout, world in (([], 1), (LAYOUT, 4)):
        words = ["loss.image_tokens=1", *layout]
        for proof in ranks.run(
            "whole_cases:prove", str(tmp_path / "m"), str(reference), words, world=world, planned=False
        ):
            assert max(proof.largest.values()) <= 2e-4, proof.largest
            assert max(proof.packed.values()) <= 5e-5 and max(proof.alone.values()) <= 5e-5
            assert proof.loss == pytest.approx((float(wanted["mean_loss"]),) * 2, rel=1e-5)
            assert proof.answers == [wanted[f"s{number}.answer"].tolist() for number in range(3)]
            assert proof.steps[0] > proof.steps[1] > proof.steps[2]


@pytest.mark.dist
@pytest.mark.long
def test_a_picture_as_the_answer(made: Made) -> None:
    """As many codes as a picture has, those of whole forward passes; the same at TP 2 x PP 2 + SP."""
    where = (str(made.root / "recipe.yaml"), str(made.root / "m"))
    (one,) = ranks.run("chameleon_cases:said", *where, [], world=1)
    many = ranks.run("chameleon_cases:said", *where, LAYOUT, world=4)
    assert len(one["codes"]) == PER_PICTURE and one["codes"] == one["whole"]
    assert 0 <= min(one["codes"]) <= max(one["codes"]) < CODES and one["drawn"] != one["codes"]
    assert one["others"] and one["masked"] < -1e30
    assert all((rank["codes"], rank["drawn"]) == (one["codes"], one["drawn"]) for rank in many)


def encoded(made: Made, data: str, *words: str) -> list[Any]:
    """Return what the reader makes of each sample of a data set: the sample, or why it is left out."""
    recipe = made.recipe(f"data.train.0.path={made.root / data}", *words)
    encoder = PackEncoder(
        recipe.data, ["data"], tokenizer_of(recipe), plan_of(recipe.model), codes=picture_tokens(recipe)
    )
    reader, found = open_shards(str(made.root / data)), []
    for number in range(len(reader)):
        raw = reader[number]
        files = {key: value for key, value in raw.items() if not key.startswith("__")}
        checked = encoder.encode_sample(RawSample(raw["__key__"], (), files, 0, raw["__shard__"], None))
        found.append(checked.sample.encoded if checked.sample is not None else checked.skipped.cause)
    return found


def test_labels_of_pictures_by_the_key(made: Made) -> None:
    """0 predicts none; 1 all, in questions and answers; 0.5 with this weight. The tokens are those of the codes."""
    prepared(made.root, "draws", "--image-codes", str(made.root / "m"), source="draws.json")
    plain, whole, half = (encoded(made, "draws", f"loss.image_tokens={key}") for key in (0, 1, 0.5))
    codes = members(made.root / "draws")
    assert plain[-1] == "an answer shows a picture, and loss.image_tokens is 0"
    for number, (one, other) in enumerate(zip(whole, half, strict=True)):
        shown = np.flatnonzero((one.tokens >= made.first) & (one.tokens < made.first + CODES))
        mine = [np.frombuffer(codes[key], "<i2") for key in sorted(codes) if f"-{number:08d}." in key]
        assert one.tokens[shown].tolist() == [int(code) + made.first for part in mine for code in part]
        assert (one.labels[shown] == one.tokens[shown]).all() and one.weights is None
        assert (other.labels == one.labels).all() and (other.weights is None) == (not len(shown))
        if len(shown):
            assert (
                set(other.weights[shown].tolist()) == {0.5} and other.weights.sum() == len(one.tokens) - len(shown) / 2
            )
        if number < len(whole) - 1:
            assert (plain[number].tokens == one.tokens).all() and (plain[number].labels[shown] == IGNORE_INDEX).all()
    assert len(codes) == 11 and len(whole[-1].tokens) > PER_PICTURE
    assert all(
        isinstance(one, str) == (number % 4 > 0)
        for number, one in enumerate(encoded(made, "pixels", "loss.image_tokens=1"))
    )


@pytest.mark.parametrize(
    ("spoilt", "cause"),
    [
        (
            b"\x28\x00" * PER_PICTURE,
            f"bad codes (a code of a picture is not from 0 to {CODES - 1}; run megavlm prepare",
        ),
        (
            b"\xff\xff" * PER_PICTURE,
            f"bad codes (a code of a picture is not from 0 to {CODES - 1}; run megavlm prepare",
        ),
        (b"\x01\x00" * (PER_PICTURE - 1), f"bad codes (codes of a picture are not {PER_PICTURE}; run megavlm prepare"),
    ],
    ids=["above", "below", "few"],
)
def test_bad_codes_cost_their_sample(spoilt: bytes, cause: str, made: Made) -> None:
    recipe = made.recipe()
    encoder = PackEncoder(
        recipe.data, ["data"], tokenizer_of(recipe), plan_of(recipe.model), codes=picture_tokens(recipe)
    )
    raw = open_shards(str(made.root / "codes"))[1]
    files = {"json": raw["json"], "codes0": spoilt}
    checked = encoder.encode_sample(RawSample("key", (), files, 0, "shard-000000.tar", None))
    assert checked.sample is None and checked.skipped is not None and checked.skipped.cause.startswith(cause)
    assert (checked.skipped.shard, checked.skipped.key) == ("shard-000000.tar", "key")


def test_codes_that_nothing_tells_of_are_not_trained_on(made: Made) -> None:
    """Shards that were copied without what says whose codes they hold."""
    recipe = made.recipe()
    encoder = PackEncoder(
        recipe.data,
        ["data"],
        tokenizer_of(recipe),
        plan_of(recipe.model),
        codes=picture_tokens(recipe),
        carded=[False],
    )
    files = open_shards(str(made.root / "codes"))[1]
    checked = encoder.encode_sample(RawSample("key", (), dict(files), 0, "shard-000000.tar", None))
    assert checked.sample is None and checked.skipped is not None
    assert checked.skipped.cause.startswith(f"codes without {CARD}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": "0" * 64}, f"encoder is {'0' * 64}, this run's is"),
        ({"num_codes": 41}, "num_codes is 41, this run's is 40 (model.language.image_tokens)"),
        ({"image": "SquashPlan()"}, "image is SquashPlan(), this run's is"),
        ({"version": 2}, "is of version 2, this megavlm's is 1"),
        ({"more": 2}, "is damaged; run megavlm prepare --image-codes again"),
    ],
)
def test_codes_of_another_model_are_refused(change: dict[str, Any], words: str, made: Made, tmp_path: Path) -> None:
    tree = json.loads((made.root / "codes" / CARD).read_text())
    (tmp_path / CARD).write_text(json.dumps(tree | change))
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        check_codes(tmp_path, picture_tokens(made.recipe(), tree["encoder"]))
    assert str(tmp_path / CARD) in str(raised.value)


@pytest.mark.dist
def test_what_codes_do_not_go_with_is_said_before_training(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """Another encoder's codes; pixels that are not there; options and keys that go with codes alone."""
    other = shutil.copytree(made.root / "codes", made.root / "other")
    card = json.loads((other / CARD).read_text())
    (other / CARD).write_text(json.dumps(card | {"encoder": "f" * 64}))
    done = ranks.megavlm(made.words("run-other", "other"), world=1, check=False)
    assert set(done.codes) == {2} and "encoder is ffff" in done.stdout + done.stderr
    check_codes(made.root / "pixels", None)
    with pytest.raises(UserError, match="prepare it again without --codes-only"):
        check_codes(made.root / "codes", None)
    rows, out = str(made.root / "rows.json"), str(made.root / "never")
    page = ["inspect", "--recipe", str(made.root / "recipe.yaml"), str(made.root / "codes"), "-o", f"{out}.html"]
    m = str(made.root / "m")
    for words, line in (
        (["prepare", rows, "--out", out, "--codes-only"], "--codes-only needs --image-codes CHECKPOINT"),
        (["prepare", rows, "--out", out, "--image-codes", out], "never"),
        (["generate", m, "--prompt", "a", "--image-tokens", "a.png"], "must end with .npy or .json"),
        (["generate", m, "--prompt", "a", "--image-tokens", "a.npy", "--max-new-tokens", "3"], "leave it out"),
        (page, "prepare it again without --codes-only"),
    ):
        assert main(words) == 2 and line in capsys.readouterr().err
    assert not Path(out).exists()
    with pytest.raises(UserError, match=re.escape("loss.image_tokens: pictures of the tower")):
        check_recipe(load_recipe("llava_1_5_7b/sft", ["loss.image_tokens=1"], expand_presets))


@pytest.mark.parametrize("changed", [False, True], ids=["equal", "other codes"])
def test_the_check_compares_tokens(
    changed: bool, made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """``megavlm convert check``: tokens of pictures, logits, answers; and a codebook that is another there."""
    hf = Path(shutil.copytree(made.root / "hf", tmp_path / "hf"))
    if changed:
        state = load_file(hf / "model.safetensors")
        name = "model.vqmodel.quantize.embedding.weight"
        state[name] = state[name].roll(1, 0)
        save_file(state, hf / "model.safetensors", metadata={"format": "pt"})
    words = ["convert", "check", "--hf", str(hf), "--checkpoint", str(made.root / "m"), "--max-new-tokens", "4"]
    with caplog.at_level(logging.INFO):
        assert main(words) == int(changed), caplog.text
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "ChameleonForConditionalGeneration, fp32" in text and "3: no picture" in text
    assert text.count("tokens of pictures equal") == (0 if changed else 2)
    assert text.count(f"tokens of pictures {PER_PICTURE} differ") == (2 if changed else 0)
    assert ("differs: tokens of pictures, logits, answers" in text) is changed
    if not changed:
        assert text.count("greedy answers: equal") == 3 and "all within the tolerance" in text


def test_several_views_of_a_picture_are_refused_by_the_recipe(made: Made) -> None:
    """Whatever image plan makes them of this tower; not when data is opened."""
    several = []
    for kind, one in plan_kinds().items():
        recipe = made.recipe("loss.image_tokens=1", f"model.image={{kind: {kind}}}")
        try:
            fixed = plan_of(recipe.model).fixed
        except UserError:
            continue  # a plan that wants keys of its own, or another tower
        assert fixed == one.plan.fixed
        line = (
            f"loss.image_tokens: model.image.kind {kind} makes several views of a picture, whose codes are not stored"
        )
        try:
            check_recipe(recipe)
            found = ""
        except UserError as error:
            found = str(error)
        assert (line in found) is not fixed, (kind, found)
        several += [] if fixed else [kind]
    assert {"dynamic_tiles", "anyres"} <= set(several)


@pytest.mark.long
def test_the_command_writes_a_pictures_codes(made: Made) -> None:
    for name in ("a.npy", "a.json"):
        words = ["generate", str(made.root / "m"), f"data.tokenizer={made.root / 'hf' / 'tokenizer.json'}"]
        assert main([*words, "--prompt", "draw", "--image-tokens", str(made.root / name)]) == 0
    codes = np.load(made.root / "a.npy").tolist()
    assert json.loads((made.root / "a.json").read_text()) == {"codes": codes} and len(codes) == PER_PICTURE
