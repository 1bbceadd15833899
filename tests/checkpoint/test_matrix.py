"""Every registered connector, tower and decoder at hard layouts: saved, resumed, spread anew, exported; bit for bit.

The parts come from the registries: what is registered later is tried without anyone remembering. Presets that differ
in sizes alone store the same tensors, and one of them is tried. Not a full product: every part is trained at a layout
of tensor parallelism, which cuts its tensors, and loaded, saved and exported at one of pipelines, which count its
layers; every other layout comes with one model of three parts.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from family_choice import changed_of
from pydantic import TypeAdapter
from run_cases import alike, tensors

from megavlm.architectures import connectors, decoders, towers
from megavlm.checkpoint.hf.outgoing import export
from megavlm.checkpoint.hf.shapes import alone
from megavlm.checkpoint.manifest import is_proven
from megavlm.checkpoint.slots import find_slots
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.config import architecture as registry
from megavlm.config.schema import ConnectorConfig, ModelConfig, VisionConfig
from megavlm.families.presets import expand_presets, load_presets

VOCABULARY = 517
# Sizes for what has such keys; four image tokens, as in ``tiny``'s packs.
SMALL = {
    "vision": {"image_size": 32, "patch_size": 16, "hidden_size": 48, "num_layers": 2, "num_attention_heads": 4}
    | {"ffn_hidden_size": 96, "positional_grid": 2, "init_method_std": 0.1},
    "connector": {"num_queries": 4, "head_dim": 16, "patches": 4, "output_grid": 2, "hidden_size": 32},
    "language": {"num_layers": 6, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}
    | {"num_query_groups": 4, "kv_channels": 16, "vocab_size": VOCABULARY, "vocab_divisor": 1}
    | {"max_position_embeddings": 2048, "init_method_std": 0.1},
}
_SAM = {"image_size": 32, "patch_size": 4, "hidden_size": 48, "num_layers": 2, "num_attention_heads": 4}
_SAM |= {"ffn_hidden_size": 96, "window_size": 3, "global_layers": [1], "neck_size": 8, "output_grid": 2}
_CONVNEXT = {"image_size": 32, "depths": [1, 1, 2], "widths": [16, 24, 48], "feature_stages": None}
TOWERS = {
    "sam": {**_SAM, "init_method_std": 0.1},
    "vit_sam": SMALL["vision"] | {f"high_{key}": value for key, value in _SAM.items()},
    # As many places as the first tower's map has at either size of its patches, or twice as many.
    "vit_vit": SMALL["vision"]
    | {f"high_{key}": value for key, value in SMALL["vision"].items()}
    | {"high_patch_size": 8, "high_positional_grid": 4},
    "convnext": {**_CONVNEXT, "init_method_std": 0.1},
    # The second tower's maps in twice the places that the first one's have.
    "vit_convnext": SMALL["vision"]
    | {f"high_{key}": value for key, value in _CONVNEXT.items()}
    | {"high_feature_stages": [2, 3]},
}
"""Sizes of towers that have other keys than a ViT, by architecture."""
LANGUAGES = {
    "mamba": {"num_layers": 6, "hidden_size": 64, "intermediate_size": 96, "time_step_rank": 5, "state_size": 4}
    | {"vocab_size": VOCABULARY, "vocab_divisor": 1, "init_method_std": 0.1},
}
"""Sizes of language models that have other keys than a decoder, by architecture."""
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
LATENT = {"num_query_groups": 4, "rotary_percent": 0.5, "kv_lora_rank": 24, "v_head_dim": 12}
Q_FORMER = {"num_queries": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64}
OF_PAIRS = {"vit_sam": "hybrid_split", "vit_convnext": "patch_mining"}
"""Connectors of two towers, by the architecture of the pair."""
ELSEWHERE = ("tiled_vit", "vq_gan", "codes", "encoder_decoder")
"""A picture is one token here, and layers attend to it: tests/models/test_cross.py, tests/families/test_mllama.py. Or
it is codes, of a tower that is never trained: tests/families/test_chameleon.py. Or there is no pipeline:
tests/families/test_pali3.py.

Layers that attend to a second tower's features beside text: tests/models/test_cross_beside.py, their family's row."""
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, TP2, PP2),
    "tp4": (4, {"tensor_model_parallel_size": 4}, {**TP2, **PP2}),
    "pp3-uneven": (3, {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 2}, {}),
    "vpp3": (2, {**PP2, "virtual_pipeline_model_parallel_size": 3}, TP2),
    "dp3-overlapped": (
        3,
        {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 9000},
        {"pipeline_model_parallel_size": 3},
    ),
    "tp2-dp3-sp": (6, {**TP2, "sequence_parallel": True}, {"pipeline_model_parallel_size": 3}),
    "tied-pp2": (2, PP2, TP2),
}
"""Ranks, a layout, and the other one that is loaded at afterwards."""
CUT = ("tp2", "tp4", "tp2", "tp4", "tp2-dp3-sp")
"""Layouts that cut every kind of tensor, which models take in turn; all are loaded at pipelines afterwards."""
SHORT = 10
"""So many models ``make test`` has time for, at 8 s each; the others are long, and tried where their parts changed."""
PARTS = [
    f"{room.__name__.rpartition('.')[2]}.{name}" for room in (towers, connectors, decoders) for name in room.FOLDERS
]
"""All of them, as ``pytest.mark.family`` takes them."""


def names(kind: str) -> list[str]:
    """Return the presets of a registry, one for each set of tensors that some store, patterns filled in twice."""
    load_presets()
    found = {"vision": registry.VISION, "connector": registry.CONNECTORS, "language": registry.LANGUAGE}[kind]
    wanted = []
    for name in found.names():
        if "<N>" not in name and found.find(name).architecture.name in ELSEWHERE:
            continue
        if kind == "language" and {"cross_attention_layers", "cross_hidden_size"} & {*found.find(name).values}:
            continue
        wanted += [name.replace("<N>", count) for count in (("2", "3") if "<N>" in name else ("",))]
    first: dict[Any, str] = {}
    with alone():
        for name in wanted:
            model = make_model(**{kind: name, **partner(kind, name)})
            # Connectors store the same under the same names, whatever their widths.
            stored = {
                key: (slot.key, slot.global_shape if kind != "connector" else len(slot.global_shape))
                for key, slot in find_slots(model, (kind,)).items()
            }
            first.setdefault((found.find(name).architecture.name, *stored.items()), name)
    return list(first.values())


def partner(kind: str, name: str) -> dict[str, str]:
    """Return the connector that a pair of towers asks for, or a pair that a connector does; else nothing."""
    if kind == "vision" and (made := OF_PAIRS.get(registry.VISION.find(name).architecture.name)):
        return {"connector": made}
    connectors = registry.CONNECTORS
    own = connectors.find(name).architecture if kind == "connector" else None
    pair = next((pair for pair, made in OF_PAIRS.items() if connectors.find(made).architecture is own), None)
    towers = registry.VISION
    return {"vision": next(one for one in towers.names() if towers.find(one).architecture.name == pair)} if pair else {}


def branches(vision: str, connector: str, language: str) -> dict[str, Any]:
    """Return the ``model`` branch of a small model of three presets."""
    tree: dict[str, Any] = {"preset": None, "vision": {}, "connector": {}, "language": {}}
    kinds = {"vision": vision, "connector": connector, "language": language}
    for kind, name in kinds.items():
        own = {"vision": registry.VISION, "connector": registry.CONNECTORS, "language": registry.LANGUAGE}[kind]
        small = SMALL[kind]
        if kind == "connector":  # keys that not every connector has
            small = {key: value for key, value in small.items() if key in own.find(name).values}
            small |= {"q_former": Q_FORMER, "glu": {"ffn_hidden_size": 96}}.get(name, {})
        if kind == "language" and "num_moe_experts" in own.find(name).values:
            small = small | EXPERTS
            if isinstance(own.find(name).values.get("moe_layer_freq"), list | tuple):  # of as many layers as it has
                small["moe_layer_freq"] = [0, 1, 0, 1, 1, 1]
        if kind == "language" and "kv_lora_rank" in own.find(name).values:
            small = small | LATENT
        if kind == "language":
            small = LANGUAGES.get(own.find(name).architecture.name, small)
        if kind == "vision":
            small = _tower(name)
        tree[kind] = {"preset": name, **small}
    if packed("vision", vision) and any_size(connector):  # it makes a token of each patch
        tree["vision"]["spatial_merge_size"] = 1
    if dense(connector):
        tree["vision"]["feature_layers"] = [0, 1, 2]
    beside = registry.LANGUAGE.find(language).values.get("use_parallel_residual")
    if beside or tree["language"].keys() >= {"time_step_rank"}:  # adds no levels behind its layers
        tree["vision"].pop("deepstack_layers", None)
    whole = TypeAdapter(ModelConfig).validate_python(expand_presets({"model": tree})["model"])
    # It makes one token of several patches; blocks are that large whatever becomes of them.
    if whole.tokens_per_view != SMALL["connector"]["num_queries"] or packed("vision", vision):
        if "depths" in tree["vision"]:
            tree["vision"]["patch_size"] = 2
        else:
            tree["vision"]["patch_size"] //= 2
            if _has_table(vision):  # beside the features: of as many places
                tree["vision"]["positional_grid"] *= 2
        if "output_grid" in tree["vision"]:
            tree["vision"]["output_grid"] *= 2
    return tree


def _has_table(vision: str) -> bool:
    return bool(registry.VISION.find(vision).values.get("feature_table"))


def make_model(vision: str = "tiny_vit", connector: str = "linear", language: str = "llama") -> ModelConfig:
    tree = expand_presets({"model": branches(vision, connector, language)})["model"]
    return TypeAdapter(ModelConfig).validate_python(tree)


def _tower(name: str) -> dict[str, Any]:
    """Return the small sizes of a tower; of one for pictures of any size, its table, windows and levels as it has
    them."""
    preset = registry.VISION.find(name)
    assert preset.architecture is not None
    small = dict(TOWERS.get(preset.architecture.name, SMALL["vision"]))
    small |= {key: 1 for key in ("second_neck_layer", "high_second_neck_layer") if preset.values.get(key) is not None}
    if not packed("vision", name):
        return small
    if "positional_grid" not in preset.values:
        del small["positional_grid"]
    if "window_size" in preset.values:
        small |= {"window_size": 16, "full_attention_layers": [1]}
    if name.startswith("qwen3_vl"):
        small["deepstack_layers"] = [0]
    return small


def packed(kind: str, name: str) -> bool:
    """Whether a tower takes pictures of any size, or a connector what such a tower gives."""
    own = {"vision": registry.VISION, "connector": registry.CONNECTORS}[kind]
    of_all = {"vision": VisionConfig, "connector": ConnectorConfig}[kind]
    config = own.find(name).architecture.config
    return config.packed is not of_all.packed


def any_size(connector: str) -> bool:
    """Whether a connector takes what towers of either kind give, patch by patch."""
    return registry.CONNECTORS.find(connector).architecture.name == "mlp"


def dense(connector: str) -> bool:
    """Whether a connector takes features of several layers."""
    return registry.CONNECTORS.find(connector).architecture.name == "dense_connector"


@functools.cache
def parts() -> dict[str, list[str]]:
    return {kind: names(kind) for kind in ("vision", "connector", "language")}


@functools.cache
def fronts() -> list[tuple[str, str]]:
    """Return towers, each with a connector that takes what it gives: every tower and every connector once at least."""
    pairs = []
    alone = [name for name in parts()["vision"] if not partner("vision", name)]
    pairs += [(name, partner("vision", name)["connector"]) for name in parts()["vision"] if name not in alone]
    for kind in (False, True):
        towers = [name for name in alone if packed("vision", name) == kind]
        fitting = [name for name in parts()["connector"] if packed("connector", name) == kind or any_size(name)]
        connectors = [name for name in fitting if not dense(name) and not partner("connector", name)]
        count = max(len(towers), len(connectors))
        pairs += [(towers[i % len(towers)], connectors[i % len(connectors)]) for i in range(count)]
    # A norm behind the last layer does not go with features of others.
    bare = next(tower for tower in alone if not getattr(make_model(vision=tower).vision, "post_layernorm", True))
    pairs += [(bare, name) for name in parts()["connector"] if dense(name)]
    taken = {connector for _, connector in pairs}
    others = [name for name in parts()["connector"] if partner("connector", name) and name not in taken]
    return pairs + [(partner("connector", name)["vision"], name) for name in others]


def model_count() -> int:
    """Return how many models hold every part at least once: the lists are counted through together."""
    return max(len(fronts()), len(parts()["language"]))


def models_at(layout: str) -> list[int]:
    """Return which models to try at a layout: each comes once where tensors are cut, and one at each other layout."""
    others = [name for name in LAYOUTS if name not in CUT]
    if layout in others:
        return [others.index(layout) * model_count() // len(others)]
    return [number for number in range(model_count()) if CUT[number % len(CUT)] == layout]


def chosen(number: int) -> dict[str, str]:
    vision, connector = fronts()[number % len(fronts())]
    return {
        "vision": vision,
        "connector": connector,
        "language": parts()["language"][number % len(parts()["language"])],
    }


def parts_of(number: int) -> list[str]:
    """Return the folders of a model's parts."""
    rooms = {"vision": registry.VISION, "connector": registry.CONNECTORS, "language": registry.LANGUAGE}
    return [folder_of(rooms[kind].find(name)) for kind, name in chosen(number).items()]


def folder_of(preset: Any) -> str:
    """Return the folder of a preset's architecture, as ``pytest.mark.family`` takes it."""
    return ".".join(preset.architecture.config.__module__.split(".")[2:4])


def test_every_part_is_cut_and_loaded_at_pipelines_and_every_layout_comes() -> None:
    for kind, found in parts().items():
        assert {chosen(number)[kind] for layout in CUT for number in models_at(layout)} == set(found)
    for layout in CUT:
        _, first, second = LAYOUTS[layout]
        assert first["tensor_model_parallel_size"] > 1 and second["pipeline_model_parallel_size"] > 1
    assert all(models_at(layout) for layout in LAYOUTS)
    assert {part for number in range(model_count()) for part in parts_of(number)} <= set(PARTS)
    assert {"linear", "mlp2x_gelu", "mlp3x_gelu", "resampler"} <= set(parts()["connector"])
    assert len(parts()["vision"]) >= 3 and len(parts()["language"]) >= 3


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_resumed_spread_and_exported(layout: str, tmp_path: Path) -> None:
    for number in models_at(layout):
        if number < SHORT or layout not in CUT:
            check(layout, number, tmp_path / str(number))


@pytest.mark.dist
@pytest.mark.long
@pytest.mark.family("matrix", parts=PARTS)
@pytest.mark.parametrize("layout", dict.fromkeys(CUT))
def test_the_same_of_the_other_models(layout: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    others = {str(number): parts_of(number) for number in models_at(layout) if number >= SHORT}
    for number in map(int, changed_of(request.config, request.path, others)):
        check(layout, number, tmp_path / str(number))


def check(layout: str, number: int, root: Path) -> None:
    world, first, second = LAYOUTS[layout]
    model = branches(**chosen(number))
    model["language"]["tie_word_embeddings"] = layout == "tied-pp2"
    if layout == "tied-pp2" and "lm_head_bias" in registry.LANGUAGE.find(model["language"]["preset"]).values:
        model["language"]["lm_head_bias"] = False  # the embedding has none
    if layout == "tp4":  # more ranks than key/value heads
        language = model["language"]
        own = registry.LANGUAGE.find(language["preset"]).values
        shares = not (own.get("head_layernorm") or own.get("kv_lora_rank"))
        if shares and "num_query_groups" in language:
            model["language"]["num_query_groups"] = 2
        # The ranks hold towers whole, which they do not divide, and connectors.
        uneven = {"num_attention_heads": 3, "ffn_hidden_size": 97}
        model["vision"] |= {key: value for key, value in uneven.items() if key in model["vision"]}
        model["connector"]["tensor_parallel"] = "replicate"
    if (
        "num_moe_experts" in model["language"]
    ):  # experts shared out over tensor-parallel ranks take pieces of the sequence
        apart = [
            {**one, "sequence_parallel": True} if "tensor_model_parallel_size" in one else one
            for one in (first, second)
        ]
        first, second = apart
    training = {"global_batch_size": 3 if "dp3" in layout else 2, "precision": "bf16" if number % 2 else "fp32"}
    shared = {"model": model, "training": training}
    here, there = {**shared, "parallel": first}, {**shared, "parallel": second}
    one, again, other = (root / name for name in ("one", "again", "other"))
    half = "step-00000002"
    todo = [
        (here, str(one), None, (2, 3)),
        (here, str(again), str(one / half), (3,)),
        (there, str(other), str(one / half), (2,)),
    ]
    losses, resumed, _ = ranks.run("run_cases:jobs", todo, world=world)[-1]
    assert resumed == losses[-1:]
    assert is_proven(one / half) and is_proven(other / half)
    last = "step-00000003"
    keys = CheckpointReader(one / last).tensors()
    assert any(key.startswith("optimizer.state.exp_avg_sq.connector.") for key in keys)
    assert alike(again / last, one / last, VOCABULARY)
    assert tensors(other / half, VOCABULARY) == tensors(one / half, VOCABULARY)
    assert exported(one / half, root / "hf-one") == exported(other / half, root / "hf-other")


def exported(checkpoint: Path, out: Path) -> dict[str, bytes]:
    """Export to the first family that fits, else read as an export does; return what it wrote."""
    try:
        export(checkpoint, out)
    except ValueError as error:
        assert "famil" in str(error), error
        model = TypeAdapter(ModelConfig).validate_python(saved_model(checkpoint))
        with alone():
            slots = find_slots(model)
        reader = CheckpointReader(checkpoint)
        whole = {name: reader.read(slot) for name, slot in slots.items()}
        return {name: one.contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, one in whole.items()}
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


def saved_model(checkpoint: Path) -> dict[str, Any]:
    from megavlm.config import yaml12

    return dict(yaml12.parse((checkpoint / "recipe.yaml").read_text())["model"])
