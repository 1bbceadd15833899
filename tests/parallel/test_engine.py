"""Keys of the engine branch: each reaches Megatron-Core's configuration, and what a machine lacks is said in a line."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.pipeline_parallel.schedules import set_current_microbatch
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import TypeAdapter
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe

from megavlm.architectures.connectors.resampler.build import Resampler
from megavlm.architectures.context import BuildContext
from megavlm.architectures.decoders.decoder import build as decoder
from megavlm.architectures.towers.vit import build as vit
from megavlm.config.errors import RecipeError
from megavlm.config.schema import EngineConfig, ModelConfig, ParallelConfig
from megavlm.data.device_batch import make_batch
from megavlm.families.presets import expand_presets
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.engine import Machine, check_machine, settings, without_fp8
from megavlm.parallel.megatron_versions import cuda_graph_field
from megavlm.parallel.state import process_groups
from megavlm.training.build import build_training
from megavlm.training.graphs import LayerGraphs
from megavlm.training.step import train_step

H100 = Machine((9, 0), (13, 0), (2, 9, 0), fused_wgrad=True)
B200 = Machine((10, 0), (13, 0), (2, 9, 0))


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Hold the groups of a single process, which models are built in."""
    with process_groups(ParallelConfig(), seed=1234):
        yield


def context(*, initialize: bool = True, **engine: Any) -> BuildContext:
    return BuildContext(ParallelConfig(), torch.bfloat16, initialize=initialize, engine=EngineConfig(**engine))


def language_config(**engine: Any) -> TransformerConfig:
    return decoder.transformer_config(tiny_recipe().model.language, context(**engine))


def vision_config(**engine: Any) -> TransformerConfig:
    return vit.transformer_config(tiny_recipe().model.vision, context(**engine))


@pytest.mark.parametrize(
    ("engine", "field", "value"),
    [
        ({"fp8": "e4m3"}, "fp8", "e4m3"),
        ({"fp8": "hybrid"}, "fp8", "hybrid"),
        ({"fp8": "hybrid", "fp8_recipe": "blockwise"}, "fp8_recipe", "blockwise"),
        ({"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_margin": 2}, "fp8_margin", 2),
        ({"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 16}, "fp8_amax_history_len", 16),
        ({"fp8": "hybrid", "fp8_amax_compute_algo": "most_recent"}, "fp8_amax_compute_algo", "most_recent"),
        ({"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_wgrad": False}, "fp8_wgrad", False),
        ({"fp8": "hybrid", "fp8_param_gather": True}, "fp8_param", True),
        ({"fp8": "hybrid", "first_last_layers_bf16": True}, "first_last_layers_bf16", True),
        (
            {"fp8": "hybrid", "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2},
            "num_layers_at_start_in_bf16",
            2,
        ),
        (
            {"fp8": "hybrid", "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 0},
            "num_layers_at_end_in_bf16",
            0,
        ),
        ({"tp_comm_overlap": True}, "tp_comm_overlap", True),
        ({"bias_activation_fusion": "on"}, "bias_activation_fusion", True),
        ({"bias_dropout_fusion": "on"}, "bias_dropout_fusion", True),
        ({"gradient_accumulation_fusion": "on"}, "gradient_accumulation_fusion", True),
        ({"cross_entropy_loss_fusion": "on"}, "cross_entropy_loss_fusion", True),
        ({"cross_entropy_fusion_impl": "te"}, "cross_entropy_fusion_impl", "te"),
        ({"cuda_graph_impl": "transformer_engine"}, "cuda_graph_impl", "transformer_engine"),
    ],
)
def test_a_key_reaches_the_configuration_of_the_language_model(engine, field, value):
    assert getattr(language_config(**engine), field) == value
    plain = language_config(fp8="hybrid") if "fp8" in engine and field != "fp8" else language_config()
    assert getattr(plain, field) != value


def test_the_mlp_becomes_graphs():
    chosen = getattr(language_config(cuda_graph_impl="transformer_engine"), cuda_graph_field())
    assert [part.name for part in chosen] == ["mlp"]
    assert getattr(language_config(), cuda_graph_field()) != chosen


def test_the_rope_kernel_is_asked_of_the_configuration():
    # The real configuration refuses it without Transformer Engine, so it is asked for and would be used.
    with pytest.raises(ValueError, match="apply_rope_fusion is not available"):
        language_config(apply_rope_fusion="on")


def test_tower_and_connector_stay_in_bf16_unless_told():
    assert vision_config(fp8="hybrid").fp8 is None
    eight = vision_config(fp8="hybrid", fp8_recipe="tensorwise", vision_bf16=False, first_last_layers_bf16=True)
    assert (eight.fp8, eight.fp8_recipe, eight.first_last_layers_bf16) == ("hybrid", "tensorwise", False)
    engine = EngineConfig(fp8="hybrid")
    assert "fp8" not in settings(engine, "connector", H100, engine_layers=True, bf16=True)
    engine = EngineConfig(fp8="hybrid", connector_bf16=False)
    assert settings(engine, "connector", H100, engine_layers=True, bf16=True)["fp8"] == "hybrid"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without Transformer Engine")
def test_an_fp8_connector_is_built_from_transformer_engine():
    eight = context(initialize=False, fp8="hybrid", connector_bf16=False)
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"engine\.connector_bf16: false needs Transformer Engine"),
    ):
        Resampler(tiny_recipe().model, eight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without Transformer Engine")
def test_graphs_find_the_layers_and_the_micro_batch():
    recipe = tiny_recipe(training={"precision": "bf16"}, engine={"cuda_graph_impl": "transformer_engine"})
    training = build_training(recipe, IMAGE_TOKEN)
    layers = training.modules[0].language.decoder.layers
    set_current_microbatch(training.chunks[0], 3)  # as Megatron-Core's schedules do
    assert [layer.current_microbatch for layer in layers] == [3] * 4
    assert all(layer.cuda_graphs == [] for layer in layers)
    assert not any(hasattr(layer, "cuda_graphs") for layer in training.modules[0].vision.transformer.layers)
    graphs = LayerGraphs(recipe, training, 1)
    for _ in range(3):
        graphs.before_step()
    assert graphs.pending
    with pytest.raises(AssertionError, match="CUDA Graphs are not supported without TE"):  # the helper itself
        graphs.before_step()
    LayerGraphs(tiny_recipe(), training, 1).before_step()


def test_the_14b_builds_with_fp8_on_the_meta_device():
    model = TypeAdapter(ModelConfig).validate_python(expand_presets({"model": {"preset": "codefuse_vl_14b"}})["model"])
    with torch.device("meta"):
        chunk = VisionLanguageModel(model, context(initialize=False, fp8="hybrid", first_last_layers_bf16=True), 0)
    layers = chunk.language.decoder.layers
    assert {layer.config.fp8 for layer in layers} == {"hybrid"} and len(layers) == 40
    assert [n for n in range(40) if is_first_last_bf16_layer(layers[n].config, n)] == [0, 39]
    assert {layer.config.fp8 for layer in chunk.vision.transformer.layers} == {None}
    assert chunk.connector.config.fp8 is None


def test_fused_kernels_compute_the_same():
    """On a CPU Megatron-Core's fused functions run as plain Python: the arithmetic is held, not the kernels."""
    names = ("bias_activation_fusion", "bias_dropout_fusion", "cross_entropy_loss_fusion")

    def two_steps(choice: str) -> list[tuple[float, float | None]]:
        recipe = tiny_recipe(training={"precision": "bf16"}, engine=dict.fromkeys(names, choice))
        torch.manual_seed(5)
        training = build_training(recipe, IMAGE_TOKEN)
        assert training.modules[0].config.cross_entropy_loss_fusion == (choice == "on")
        results = []
        for seed in range(2):
            packs = [make_batch(pack, torch.from_numpy(px), torch.device("cpu")) for pack, px in random_packs(2, seed)]
            training.scheduler.step(1)
            result = train_step(training.chunks, training.optimizer, packs, num_sources=1)
            results.append((result.loss, result.grad_norm))
        return results

    for (loss, norm), (plain_loss, plain_norm) in zip(two_steps("on"), two_steps("off"), strict=True):
        assert loss == pytest.approx(plain_loss, rel=2e-3)
        assert norm == pytest.approx(plain_norm, rel=2e-2)


def test_automatic_choices():
    plain = EngineConfig()
    language = settings(plain, "language", H100, engine_layers=True, bf16=True)
    fused = (
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "apply_rope_fusion",
        "gradient_accumulation_fusion",
        "cross_entropy_loss_fusion",
    )
    assert all(language[name] for name in fused)
    assert not settings(plain, "language", H100, engine_layers=True, bf16=False)["cross_entropy_loss_fusion"]
    assert not settings(plain, "language", B200, engine_layers=False, bf16=True)["gradient_accumulation_fusion"]
    here = settings(plain, "language", Machine(), engine_layers=False, bf16=True)
    assert not any(here[name] for name in fused)
    off = EngineConfig(**dict.fromkeys(fused, "off"))
    assert not any(settings(off, "language", H100, engine_layers=True, bf16=True)[name] for name in fused)


@pytest.mark.parametrize(
    ("engine", "machine"),
    [
        ({"fp8": "hybrid"}, H100),
        ({"fp8": "hybrid", "fp8_recipe": "delayed"}, Machine((8, 9), (12, 4), (1, 13))),
        ({"fp8": "hybrid", "fp8_recipe": "blockwise"}, H100),
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, B200),
        ({"gradient_accumulation_fusion": "on"}, H100),
        ({}, Machine()),
    ],
)
def test_a_machine_that_can(engine, machine):
    check_machine(tiny_recipe(engine=engine), machine)


@pytest.mark.parametrize(
    ("engine", "machine", "expected"),
    [
        ({"fp8": "hybrid"}, Machine(), "engine.fp8: there is no CUDA device; install transformer-engine[pytorch]"),
        ({"fp8": "hybrid"}, Machine((9, 0), (13, 0)), "engine.fp8: transformer-engine is not installed; install"),
        (
            {"fp8": "hybrid"},
            Machine((8, 0), (13, 0), (2, 9)),
            "needs compute capability 8.9, this device has 8.0; take",
        ),
        ({"fp8": "hybrid"}, Machine((9, 0), (13, 0), (2, 1)), "needs transformer-engine 2.2, this is 2.1; upgrade it"),
        (
            {"fp8": "hybrid", "fp8_recipe": "blockwise"},
            Machine((9, 0), (12, 6), (2, 9)),
            "needs a torch of CUDA 12.9, this is of 12.6; upgrade it",
        ),
        (
            {"fp8": "hybrid", "fp8_recipe": "mxfp8"},
            H100,
            "needs compute capability 10.0, this device has 9.0; take anoth",
        ),
        (
            {"fp8": "hybrid", "fp8_recipe": "mxfp8"},
            Machine((12, 0), (13, 0), (2, 9)),
            "does not run on compute capability 12; take tensorwise",
        ),
        (
            {"apply_rope_fusion": "on"},
            Machine(),
            "engine.apply_rope_fusion: is Transformer Engine's, which is not here",
        ),
        ({"tp_comm_overlap": True}, Machine(), "engine.tp_comm_overlap: is Transformer Engine's, which is not here"),
        (
            {"cuda_graph_impl": "transformer_engine"},
            Machine(),
            "engine.cuda_graph_impl: is Transformer Engine's, which",
        ),
        (
            {"gradient_accumulation_fusion": "on"},
            B200,
            "engine.gradient_accumulation_fusion: needs CUDA with torch 2.8 or newer, or NVIDIA Apex; build",
        ),
    ],
)
def test_a_machine_that_cannot(engine, machine, expected):
    with pytest.raises(RecipeError) as caught:
        check_machine(tiny_recipe(engine=engine), machine)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 and expected in lines[0]


def test_generation_inside_an_fp8_run_computes_in_bf16_and_leaves_the_run_as_it_was():
    shared = SimpleNamespace(fp8="hybrid")
    other = SimpleNamespace(fp8=None)
    with pytest.raises(KeyError), without_fp8([shared, other, shared]):
        assert shared.fp8 is None and other.fp8 is None
        raise KeyError
    assert shared.fp8 == "hybrid" and other.fp8 is None
