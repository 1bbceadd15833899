"""A family of vision-language models that megavlm does not know, as another package brings it.

``tests/families/test_outside_package.py`` installs this beside an entry point and uses it; CONTRIBUTING.md's "Add a
family" walks through it. Nothing here imports torch but ``build.py``, which is imported when a model is built.
"""

import dataclasses

from megavlm.architectures.decoders.decoder.config import products
from megavlm.config.architecture import CONNECTORS, LANGUAGE, MODELS, VISION, Architecture
from megavlm.data import templates
from megavlm.data.media import register_plan
from megavlm.data.template import TEXT, ControlToken, Template, trained
from megavlm.families.registry import FAMILIES
from quilt import connector_cost, decoder_cost, tower_cost
from quilt.config import (
    PatchworkConfig,
    PoolConfig,
    ScaledDecoderConfig,
    decoder_rules,
    patchwork_products,
    patchwork_rules,
    pool_products,
    pool_rules,
)
from quilt.pictures import TopPlan, top_plan
from quilt.tables import targets

PATCHWORK = Architecture(
    name="patchwork", config=PatchworkConfig, build="quilt.build:tower", rules=patchwork_rules,
    products=patchwork_products, cost=tower_cost,
)  # fmt: skip
POOL = Architecture(
    name="pool", config=PoolConfig, build="quilt.build:connector", rules=pool_rules, products=pool_products,
    cost=connector_cost,
)  # fmt: skip
SCALED = Architecture(
    name="scaled_decoder", config=ScaledDecoderConfig, build="quilt.build:decoder", rules=decoder_rules,
    products=products, cost=decoder_cost, targets=targets,
)  # fmt: skip

TEMPLATE = Template(
    name="quilt",
    title="Quilt's question and answer",
    user=("Q: ", TEXT, "\n"),
    assistant=("A:", *trained(" ", TEXT, "<|endoftext|>")),
    tokens=(ControlToken(("<|endoftext|>",)),),
    eos=("<|endoftext|>",),
)


def register() -> None:
    """What the entry point names: everything that this package brings."""
    VISION.register("patchwork", PATCHWORK)
    VISION.register("uncounted", dataclasses.replace(PATCHWORK, name="uncounted", cost=None))  # nobody counted it yet
    CONNECTORS.register("pool", POOL, side=2)
    LANGUAGE.register("scaled", SCALED)
    MODELS.register(
        "quilt_tiny",
        vision={"preset": "patchwork", "image_size": 32, "patch_size": 8, "hidden_size": 48, "num_layers": 2},
        connector={"preset": "pool"},
        language={
            "preset": "scaled", "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4,
            "num_query_groups": 2, "kv_channels": 16, "vocab_size": 512, "max_position_embeddings": 512,
            "logits_scaling": 2.0,
        },
    )  # fmt: skip
    templates.register(TEMPLATE)
    register_plan("top", TopPlan, top_plan)
    FAMILIES.register("quilt.family:QuiltFamily")
