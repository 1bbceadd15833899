"""What a run trained is in the files that are written or read, or these are refused by name: over all families.

Adapters in PEFT's format (out), MiniGPT's file of what was trained (in), and what lies beside adapters (in).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from family_cases import llava
from minigpt_models import ADAPTED, QUERIES, MiniGPT
from safetensors.torch import save_file
from test_peft import adapted
from test_round_trips import CASES, make
from tinygpt_models import STAGE_4, TinyGPT
from torch import Tensor

from megavlm.architectures.adapters import is_adapter
from megavlm.checkpoint.hf.given import open_directory, understand
from megavlm.checkpoint.hf.peft import _family, _layers, _rules, export_adapter, import_adapter
from megavlm.checkpoint.hf.peft_minigpt import lost_beside, read_minigpt
from megavlm.checkpoint.hf.shapes import alone
from megavlm.checkpoint.merged import recipe_branches
from megavlm.checkpoint.slots import find_slots
from megavlm.cli import main
from megavlm.config.errors import UserError
from megavlm.config.lora import known_targets
from megavlm.config.schema import LoraConfig
from megavlm.families.known import FAMILIES

FIRST = {family: name for name, family in reversed(CASES.items()) if "language" in FAMILIES[family].parts}
"""A checkpoint of each family that has a language model."""
DELTAS: dict[str, type[MiniGPT]] = {"minigpt4": MiniGPT, "minigpt_v2": MiniGPT, "tinygpt_v": TinyGPT}
SIZES = {"minigpt4": QUERIES, "minigpt_v2": ADAPTED, "tinygpt_v": STAGE_4}


def convert(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.family(of)) for of, one in FIRST.items()])
def test_every_adapter_has_a_name_in_pefts_format(name: str, tmp_path: Path) -> None:
    """Those of experts that a family keeps in one tensor have none, and are refused (test_expert_adapters.py)."""
    given, _ = open_directory(make(name, tmp_path / "hf"))
    model, family = understand(given, {}, None).model, FAMILIES[CASES[name]]
    targets = known_targets(model.language)
    if not targets:
        return  # its architecture takes no adapters
    lora = LoraConfig(rank=2, alpha=2, targets=tuple(one.path for one in targets))
    with alone():
        slots = find_slots(model, ["language"], lora)
        layers = list(_layers(_rules(family, model, family.modules or next(iter(family.styles)))))
    left = {name for name in slots if is_adapter(name)}
    assert left
    left -= {f"{layer.ours}.{kind}" for layer in layers for kind in ("lora_a", "lora_b")}
    named = {layer.linear for layer in layers}
    assert all(".mlp.experts." in name for name in left), min(left)
    assert not left or not any("mlp.experts" in linear for linear in named)


def test_adapters_that_no_rule_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are of: the one guard behind those with words of their own."""
    from megavlm.checkpoint.hf import peft

    llava().save_pretrained(tmp_path / "hf")
    convert("hf-to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "base")
    saved = adapted(tmp_path / "base", tmp_path / "run", ["q_proj", "down_proj"], [])
    whole = peft._layers
    monkeypatch.setattr(peft, "_layers", lambda rules: (one for one in whole(rules) if "layers.2" not in one.ours))
    with pytest.raises(UserError, match=r"layers\.2\.\S+\.lora_a learned, for which the family has no place"):
        export_adapter(saved, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def file_name(published: str) -> str:
    """Return what the file of what was trained calls a tensor of a piece."""
    piece, _, name = published.partition("/")
    return {"eva_vit_g": "visual_encoder.", "llm": "llama_model.base_model.model."}.get(piece, "") + name


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.family(name)) for name in DELTAS])
def test_minigpts_file_may_hold_any_part(family: str, tmp_path: Path) -> None:
    """Every tensor of the model, one after the other: as the base has it, or trained, and then refused by name."""
    given = DELTAS[family](SIZES[family])
    hf = given.save_pretrained(tmp_path / "hf")
    convert("hf-to-megatron", "--hf", hf, "--out", tmp_path / "m")
    model, _ = recipe_branches(tmp_path / "m")
    own = _family(model, tmp_path / "m", None)
    assert own.name == family
    tensors: Mapping[str, Tensor] = given.fused(given.state_dict()) if isinstance(given, TinyGPT) else {
        given.named(name): value for name, value in given.state_dict().items()
    }  # fmt: skip
    queries, first = SIZES[family].queries is not None, "llama_model.base_model.model.model.layers.0.self_attn."
    unknown = ["Qformer.cls.predictions.bias", first.replace("base_model.model.", "") + "q_proj.lora_A.weight",
               "llama_proj9.weight", first + "q_proj.lora_magnitude_vector"]  # fmt: skip
    unknown += [] if queries else ["query_tokens"]
    with alone():
        held = {file_name(name): value for name, value in tensors.items()}
        held[first + "rotary_emb.inv_freq"] = torch.ones(3)  # a buffer
        assert not list(lost_beside(tmp_path / "x.pth", held, tmp_path / "m", model, own))
        del held[first + "rotary_emb.inv_freq"]
        trained = {name: value + 1 for name, value in held.items()} | dict.fromkeys(unknown, torch.ones(3))
        lines = list(lost_beside(tmp_path / "x.pth", trained, tmp_path / "m", model, own))
    parts = set()
    for name, line in zip(trained, lines, strict=True):
        if name in unknown:
            assert f"x.pth: holds {name}, and no part of" in line
        else:
            assert f" ({name}) is not what {tmp_path / 'm'} has" in line and "x.pth: what it holds of " in line
            parts.add(re.sub(r"language\.\S+", "", line.split(" holds of ")[1].split(" (")[0]).strip())
    wanted = {"the projection", "the tower", "the language model", "the norm"}
    assert parts == (wanted | {"the Q-Former"} if queries else wanted)


@pytest.mark.family("tinygpt_v")
def test_a_q_former_that_a_run_trained_is_not_lost(tmp_path: Path) -> None:
    """By the command, with the adapters in the same file; beside the base's own, which is taken."""
    hf = TinyGPT(STAGE_4).save_pretrained(tmp_path / "hf")
    convert("hf-to-megatron", "--hf", hf, "--out", tmp_path / "m")
    blip2 = torch.load(hf / "blip2_pretrained_flant5xxl.pth", weights_only=True)["model"]
    trained = torch.load(hf / "pretrained_minigpt.pth", weights_only=True)
    for name in ("query_tokens", "ln_vision.weight", "Qformer.bert.encoder.layer.0.attention.self.query.weight"):
        for change in (0, 1):
            state = {**trained, "model": {**trained["model"], name: blip2[name] + change}}
            torch.save(state, tmp_path / f"{name}{change}.pth")
        same, other = (tmp_path / f"{name}{change}.pth" for change in (0, 1))
        assert read_minigpt(same)[2].keys() >= {name}
        import_adapter(same, tmp_path / "m", tmp_path / f"{name}-out")
        with pytest.raises(UserError, match=rf"put it into blip2_pretrained_flant5xxl.pth .*, as {re.escape(name)}"):
            import_adapter(other, tmp_path / "m", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_weights_beside_adapters_are_refused_by_name(tmp_path: Path) -> None:
    """Whatever a trainer calls its file; what it keeps of itself is none."""
    llava().save_pretrained(tmp_path / "hf")
    convert("hf-to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "base")
    saved = adapted(tmp_path / "base", tmp_path / "run", ["q_proj"], [])
    peft = tmp_path / "llm_adapter"
    export_adapter(saved, peft)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "rng_state.pth"):
        torch.save({}, peft / name)
    import_adapter(peft, tmp_path / "base", tmp_path / "m")
    for name in ("mm_projector.bin", "vpm_resampler_embedtokens.pt", "model.safetensors", "projector.pth"):
        save_file({"x": torch.ones(2)}, peft / name)
        with pytest.raises(UserError, match=f"{name}: holds what was trained beside the adapters"):
            import_adapter(peft, tmp_path / "base", tmp_path / "no")
        (peft / name).unlink()
    for name in ("projector", "visual_encoder_adapter"):  # xtuner's
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=f"{name}: xtuner trained it together with llm_adapter"):
            import_adapter(peft, tmp_path / "base", tmp_path / "no")
        (tmp_path / name).rmdir()
