"""Adapters in PEFT's format compute in PEFT what they compute here, come back bit for bit, and merge."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from family_cases import _TEXT, IMAGE, QWEN_VL, llava, llava_qwen3, llava_qwen_siglip, qwen_vl, sample
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, Phi3Config, PhiConfig, Qwen2Config

from megavlm.checkpoint.distributed import load
from megavlm.checkpoint.saver import Saver, State
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.cli import main
from megavlm.config.help import to_yaml
from megavlm.config.load import load_recipe
from megavlm.data.media import arrange, plan_of
from megavlm.evaluation.parity import Sample, _batch
from megavlm.families.presets import expand_presets
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups

TOLERANCE = 2e-5
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["v_proj", "q_proj", "up_proj"]
CASES = {
    "llama-all": (llava, ALL, []),
    "llama-some": (llava, SOME, ["lora.train_embeddings=true", "lora.train_head=true"]),
    "qwen2-some": (llava_qwen_siglip, [*SOME, "down_proj"], []),
    "qwen3-all": (llava_qwen3, ALL, []),
    "qwen3-some": (llava_qwen3, ["k_proj", "o_proj", "gate_proj"], ["lora.train_head=true"]),
    # One adapter over queries, keys and values, one over gate and up.
    "phi3-all": (
        lambda: llava(Phi3Config(**_TEXT, pad_token_id=0)),
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        [],
    ),
    # No gate, and biases beside the adapters.
    "phi-all": (lambda: llava(PhiConfig(**_TEXT)), ["q_proj", "v_proj", "dense", "fc1", "fc2"], []),
}


def convert(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def adapted(base: Path, root: Path, targets: Sequence[str], more: Sequence[str]) -> Path:
    """Save adapters of random values for ``base``, as a run with these targets would."""
    words = ["lora.rank=4", "lora.alpha=6", f"lora.targets=[{','.join(targets)}]", f"checkpoint.load={base}",
             "modules.vision.freeze=true", "modules.connector.freeze=true", *more]  # fmt: skip
    recipe = load_recipe(base / "recipe.yaml", words, expand_presets)
    with process_groups(recipe.parallel, 1):
        model = unwrap(build_model(recipe, IMAGE)[0])
        load(base, modules=[model])
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b"):
                    parameter.normal_(std=0.2)
                elif parameter.requires_grad and not name.endswith("lora_a"):
                    parameter.mul_(1.5)
        state = State([model], run={"step": 1}, recipe_yaml=to_yaml(recipe), parent=base, base=base)
        saved = Saver(root, keep=1).save(state)
        assert saved is not None
        return saved


def ours(checkpoint: Path, one: Sample) -> Tensor:
    """Return the logits of a checkpoint."""
    recipe = load_recipe(checkpoint / "recipe.yaml", [], expand_presets)
    with process_groups(recipe.parallel, 1), torch.no_grad():
        model = unwrap(build_model(recipe, IMAGE)[0]).eval()
        load(checkpoint, modules=[model])
        batch = _batch(one, arrange(plan_of(recipe.model), one.layouts), recipe, model)
        return model(batch.tokens, batch.position_ids, batch.packed_seq_params, images=batch.images)[0, :, :120]


def theirs(model: torch.nn.Module, one: Sample) -> Tensor:
    with torch.no_grad():
        return model(
            input_ids=one.ids[None], pixel_values=one.pixels, attention_mask=torch.ones(1, len(one.ids))
        ).logits[0]


def read(directory: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_same(name: str, tmp_path: Path) -> None:
    make, targets, more = CASES[name]
    hf, base, one = tmp_path / "hf", tmp_path / "base", sample()
    make().save_pretrained(hf)
    convert("hf-to-megatron", "--hf", hf, "--out", base)
    saved = adapted(base, tmp_path / "run", targets, more)
    expected = ours(saved, one)
    assert (expected - ours(base, one)).abs().max() > 0.01  # the adapters matter

    convert("megatron-to-hf", "--megatron", saved, "--adapter", "--out", tmp_path / "peft")
    assert len({file.stat().st_mode for file in (tmp_path / "peft").iterdir()}) == 1  # who may read them
    both = PeftModel.from_pretrained(read(hf), tmp_path / "peft").eval()
    close(theirs(both, one), expected)

    convert("megatron-to-hf", "--megatron", saved, "--out", tmp_path / "whole")
    close(theirs(read(tmp_path / "whole"), one), expected)

    convert("merge", "--megatron", saved, "--out", tmp_path / "merged")
    close(ours(tmp_path / "merged", one), expected)

    convert("hf-to-megatron", "--adapter", tmp_path / "peft", "--base", base, "--out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(saved)
    close(ours(tmp_path / "back", one), expected)


def bits(checkpoint: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return every tensor of a checkpoint of adapters, without what pads a vocabulary."""
    from megavlm.checkpoint.slots import Slot

    reader, found = CheckpointReader(checkpoint), {}
    for key, entry in reader.tensors().items():
        padded = key.endswith(("word_embeddings.weight", "output_layer.weight"))
        shape = (120, *entry.size[1:]) if padded else tuple(entry.size)
        value = reader.read(Slot(key, shape, vocabulary=padded))
        found[key] = (list(value.shape), value.flatten().tolist())
    return found


def test_qwen_names(tmp_path: Path) -> None:
    """Qwen v1 has no code in Transformers; what is written is named and shaped as the original's adapters."""
    base = tmp_path / "base"
    convert("hf-to-megatron", "--hf", qwen_vl(tmp_path / "hf"), "--out", base)
    saved = adapted(base, tmp_path / "run", ["c_attn", "attn.c_proj", "w1", "w2"], ["lora.train_head=true"])
    convert(
        "megatron-to-hf", "--megatron", saved, "--adapter", "--out", tmp_path / "peft", "--base-name", "Qwen/Qwen-VL"
    )
    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    h, f = QWEN_VL.hidden, QWEN_VL.ffn
    layer = {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h), "mlp.w1": (h, f), "mlp.w2": (h, f)}
    expected = {"base_model.model.lm_head.weight": [QWEN_VL.vocab, h]}
    for i in range(QWEN_VL.layers):
        for name, (width, rows) in layer.items():
            expected[f"base_model.model.transformer.h.{i}.{name}.lora_A.weight"] = [4, width]
            expected[f"base_model.model.transformer.h.{i}.{name}.lora_B.weight"] = [rows, 4]
    assert shapes == expected
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 6, ["lm_head"])
    assert config["base_model_name_or_path"] == "Qwen/Qwen-VL"
    assert re.fullmatch(config["target_modules"], "transformer.h.31.mlp.w1")
    assert not re.fullmatch(config["target_modules"], "transformer.visual.transformer.resblocks.1.attn.c_proj")
    # c_attn's rows are [Q; K; V] there and [q, k, v] per head here: the merged weights say that both mean the same.
    convert("megatron-to-hf", "--megatron", saved, "--out", tmp_path / "whole")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    before, after = ({k: v for p in sorted(d.glob("*.safetensors")) for k, v in load_file(p).items()}
                     for d in (tmp_path / "hf", tmp_path / "whole"))  # fmt: skip
    for name in layer:
        key = f"transformer.h.1.{name}"
        a, b = (tensors[f"base_model.model.{key}.lora_{kind}.weight"] for kind in "AB")
        close(after[f"{key}.weight"], before[f"{key}.weight"] + 6 / 4 * b @ a)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a base and adapters for it, exported."""
    tmp = tmp_path_factory.mktemp("small")
    llava().save_pretrained(tmp / "hf")
    convert("hf-to-megatron", "--hf", tmp / "hf", "--out", tmp / "base")
    saved = adapted(tmp / "base", tmp / "run", ["q_proj", "down_proj"], [])
    convert("megatron-to-hf", "--megatron", saved, "--adapter", "--out", tmp / "peft")
    return tmp / "base", tmp / "peft"


def broken_config(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def broken_tensors(directory: Path, lost: str = "", renamed: str = "", shape: str = "") -> None:
    path = directory / "adapter_model.safetensors"
    tensors = {k.replace("q_proj", renamed) if renamed else k: v for k, v in load_file(path).items() if k != lost}
    if shape:
        tensors[shape] = tensors[shape][:, :-1].contiguous()
    save_file(tensors, path)


def changed_tensors(directory: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors.get(name, torch.zeros(1))).contiguous()}, path)


def every_name(directory: Path, old: str, new: str) -> None:
    path = directory / "adapter_model.safetensors"
    save_file({key.replace(old, new): value for key, value in load_file(path).items()}, path)


KEY = "base_model.model.model.language_model.layers.2.mlp.down_proj.lora_A.weight"
LAYER = "base_model.model.model.language_model.layers.{}.self_attn.q_proj.lora_B.weight"
BROKEN = {
    "dora": (lambda d: broken_config(d, use_dora=True), "use_dora is True, which is not supported"),
    "ranks": (lambda d: broken_config(d, rank_pattern={"q_proj": 8}), "rank_pattern is {'q_proj': 8}"),
    "alphas": (lambda d: broken_config(d, alpha_pattern={"q_proj": 8}), "alpha_pattern is {'q_proj': 8}"),
    "layers": (lambda d: broken_config(d, layers_to_transform=[0]), "layers_to_transform is [0]"),
    "bias": (lambda d: broken_config(d, bias="lora_only"), "bias is 'lora_only'"),
    "pissa": (lambda d: broken_config(d, init_lora_weights="pissa"), "init_lora_weights is 'pissa', which is not"),
    "pissa, quickly": (lambda d: broken_config(d, init_lora_weights="pissa_niter_4"), "'pissa_niter_4'"),
    "olora": (lambda d: broken_config(d, init_lora_weights="OLoRA"), "init_lora_weights is 'OLoRA'"),
    "corda": (lambda d: broken_config(d, init_lora_weights="corda"), "init_lora_weights is 'corda'"),
    "loftq": (lambda d: broken_config(d, init_lora_weights="loftq"), "init_lora_weights is 'loftq'"),
    "lora-ga": (lambda d: broken_config(d, init_lora_weights="lora_ga"), "init_lora_weights is 'lora_ga'"),
    "tokens": (lambda d: broken_config(d, trainable_token_indices=[1, 2]), "trainable_token_indices is [1, 2]"),
    "activated": (lambda d: broken_config(d, alora_invocation_tokens=[7]), "alora_invocation_tokens is [7]"),
    "of tomorrow": (lambda d: broken_config(d, use_next_years_kind=True), "use_next_years_kind is True, which is not"),
    "no rank": (lambda d: broken_config(d, r=None), "r is None, which is no rank"),
    "no number": (lambda d: broken_config(d, lora_alpha="big"), "lora_alpha is 'big'; it must be a number above 0"),
    "another kind": (lambda d: broken_config(d, peft_type="LOHA"), "peft_type is 'LOHA'; only LORA is supported"),
    "nan": (lambda d: changed_tensors(d, KEY, lambda v: v * float("nan")), "down_proj.lora_A.weight: holds 384 NaN"),
    "integers": (lambda d: changed_tensors(d, KEY, lambda v: v.int()), "is of type torch.int32; only floating point"),
    "rows of B": (lambda d: changed_tensors(d, LAYER.format(1), lambda v: v[:-2]), "the model's is [64, 4]"),
    "trained beside": (lambda d: torch.save({}, d / "non_lora_trainables.bin"), "non_lora_trainables.bin: holds what"),
    "magnitudes": (
        lambda d: changed_tensors(d, "base_model.model.x.lora_magnitude_vector", lambda _: torch.ones(3)),
        "has x.lora_magnitude_vector, which no layer",
    ),
    "a layer without": (lambda d: broken_tensors(d, lost=KEY), f"has no {KEY.removeprefix('base_model.model.')}"),
    "another name": (lambda d: broken_tensors(d, renamed="x_proj"), "self_attn.x_proj.lora_A.weight, which no layer"),
    "of another model": (
        lambda d: every_name(d, "model.language_model.", "gpt_neox."),
        "its gpt_neox.layers.0.mlp.down_proj.lora_A.weight is of no layer of this base's language model, whose layers"
        " are called model.language_model.layers.0.",
    ),
    "another width": (lambda d: broken_tensors(d, shape=KEY), "the model's is [4, 96]"),
    "cut short": (
        lambda d: (d / "adapter_model.safetensors").write_bytes((d / "adapter_model.safetensors").read_bytes()[:900]),
        "adapter_model.safetensors: cannot be read",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_other_adapters_are_refused(
    case: str, small: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, peft = small
    spoil, message = BROKEN[case]
    shutil.copytree(peft, tmp_path / "peft")
    spoil(tmp_path / "peft")
    words = ["--adapter", tmp_path / "peft", "--base", base, "--out", tmp_path / "out"]
    assert main(["convert", "hf-to-megatron", *map(str, words)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_without_their_base(
    small: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, peft = small
    convert("hf-to-megatron", "--adapter", peft, "--base", base, "--out", tmp_path / "m")
    base = base.rename(base.with_name("moved"))
    words = ["convert", "megatron-to-hf", "--megatron", str(tmp_path / "m"), "--out", str(tmp_path / "hf")]
    assert main(words) == 2
    assert "holds adapters for" in capsys.readouterr().err
    base.rename(base.with_name("base"))
    assert main([*words[:-1], str(tmp_path / "other"), "--base-name", "x"]) == 2
    assert "--base-name: goes with --adapter" in capsys.readouterr().err
    assert main(["convert", "merge", "--megatron", str(base.with_name("base")), "--out", str(tmp_path / "x")]) == 2
    assert "has no adapters to merge" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["before 4.52", "pickled", "rank-stabilised", "eva"])
def test_other_forms_of_the_same_adapter(kind: str, small: tuple[Path, Path], tmp_path: Path) -> None:
    """Names of another day, PEFT's first file, a scale by the root of the rank: the same function, or the same bits."""
    base, given = small
    convert("hf-to-megatron", "--adapter", given, "--base", base, "--out", tmp_path / "plain")
    peft = Path(shutil.copytree(given, tmp_path / "peft"))
    wanted, alpha = bits(tmp_path / "plain"), 6.0
    if kind == "before 4.52":
        every_name(peft, "model.model.language_model.layers.", "model.language_model.model.layers.")
        assert all(
            ".model.language_model.model.layers." in key for key in load_file(peft / "adapter_model.safetensors")
        )
    elif kind == "pickled":
        torch.save(load_file(peft / "adapter_model.safetensors"), peft / "adapter_model.bin")
        (peft / "adapter_model.safetensors").unlink()
    elif kind == "rank-stabilised":
        broken_config(peft, use_rslora=True)
        alpha = 12.0  # 6 / sqrt(4) is 12 / 4
    else:
        broken_config(peft, init_lora_weights="eva", eva_config={"rho": 2.0}, rank_pattern={"q_proj": 4})
    convert("hf-to-megatron", "--adapter", peft, "--base", base, "--out", tmp_path / "m")
    assert bits(tmp_path / "m") == wanted
    recipe = load_recipe(tmp_path / "m" / "recipe.yaml", [], expand_presets)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (
        4,
        alpha,
        ("self_attn.q_proj", "mlp.down_proj"),
    )
    both = PeftModel.from_pretrained(read(base.with_name("hf")), peft).eval()
    close(ours(tmp_path / "m", sample()), theirs(both, sample()))


def test_a_tied_embedding_that_was_trained_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT leaves the output layer as it was; here the two are one."""
    make = llava(Qwen2Config(**_TEXT, tie_word_embeddings=True), tie_word_embeddings=True)
    make.save_pretrained(tmp_path / "hf")
    convert("hf-to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "base")
    convert("megatron-to-hf", "--megatron", adapted(tmp_path / "base", tmp_path / "run", ["q_proj"], []), "--adapter",
            "--out", tmp_path / "peft")  # fmt: skip
    name = "base_model.model.model.language_model.embed_tokens.weight"
    changed_tensors(tmp_path / "peft", name, lambda _: torch.ones(120, 64))
    words = ["--adapter", tmp_path / "peft", "--base", tmp_path / "base", "--out", tmp_path / "out"]
    assert main(["convert", "hf-to-megatron", *map(str, words)]) == 2
    assert "has the embedding, which this base ties to the output layer" in capsys.readouterr().err
