"""Tensor-parallel linear layers outside of transformer layers: Megatron-Core's, or in FP8 Transformer Engine's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.config.errors import UserError


def column_linear(
    input_size: int,
    output_size: int,
    *,
    config: TransformerConfig,
    init_method: Callable[[Tensor], Any] | None,
    bias: bool = True,
    gather_output: bool = False,
) -> Any:
    """Build a layer whose outputs are split over the tensor-parallel ranks, or gathered again.

    It returns a pair, of which the first is [..., output_size / TP], or [..., output_size] with ``gather_output``.
    With ``config.fp8`` it is Transformer Engine's (not run on a GPU yet), with the same parameters.

    Raises:
        UserError: that is not installed.
    """
    if config.fp8 is None:
        return ColumnParallelLinear(
            input_size, output_size, config=config, init_method=init_method, bias=bias, gather_output=gather_output
        )
    plain = _of_transformer_engine("TEColumnParallelLinear")
    group = mpu.get_tensor_model_parallel_group()  # that of now: a part may be built as on one rank

    class Gathered(plain):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> tuple[Tensor, Any]:
            output, rest = super().forward(x)
            return gather_from_tensor_model_parallel_region(output, group=group), rest

    return (Gathered if gather_output else plain)(
        input_size,
        output_size,
        config=config,
        init_method=init_method,
        gather_output=False,
        bias=bias,
        skip_bias_add=False,
        is_expert=False,
    )


def _of_transformer_engine(name: str) -> Any:
    import megatron.core.extensions.transformer_engine as extension  # noqa: PLC0415

    if not extension.HAVE_TE:
        raise UserError("engine.connector_bf16: false needs Transformer Engine, which is not here; set it to true")
    return getattr(extension, name)


def row_linear(
    input_size: int,
    output_size: int,
    *,
    config: TransformerConfig,
    init_method: Callable[[Tensor], Any] | None,
    bias: bool = True,
) -> Any:
    """Build a layer whose inputs are split over the tensor-parallel ranks; see :func:`column_linear`."""
    kind: Any = RowParallelLinear
    extra: dict[str, Any] = {}
    if config.fp8 is not None:
        kind, extra = _of_transformer_engine("TERowParallelLinear"), {"is_expert": False}
    return kind(
        input_size,
        output_size,
        config=config,
        init_method=init_method,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=False,
        **extra,
    )
