"""Several patches become one token, side by side or averaged, through linear layers."""

from megavlm.architectures.connectors.patch_reducer import cost
from megavlm.architectures.connectors.patch_reducer.config import PatchReducerConfig, products, rules
from megavlm.config.architecture import CONNECTORS, Architecture

PATCH_REDUCER = Architecture(
    name="patch_reducer",
    config=PatchReducerConfig,
    build="megavlm.architectures.connectors.patch_reducer.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the names that a recipe may call it by."""
    # MiniGPT-v2: four patches of a row, one linear layer.
    CONNECTORS.register("concat_row", PATCH_REDUCER, merge="row", patches=4)
    CONNECTORS.register("concat_square", PATCH_REDUCER, merge="square", patches=4)
    CONNECTORS.register("average_pool", PATCH_REDUCER, merge="mean", patches=4)
    # Gemma 3: 64 x 64 patches become 16 x 16 tokens.
    CONNECTORS.register(
        "gemma3_pool",
        PATCH_REDUCER,
        merge="mean",
        patches=16,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
    )
