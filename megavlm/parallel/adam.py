"""AdamW with the state layout of NVIDIA's FusedAdam, for machines without Transformer Engine or Apex.

Megatron-Core's distributed optimizer saves and loads ``step`` per parameter group and ``exp_avg`` and
``exp_avg_sq`` per parameter. PyTorch's AdamW keeps ``step`` per parameter, which makes a resumed run silently
wrong. This class keeps FusedAdam's layout over PyTorch's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with ``step`` in the parameter group.

    Args:
        params: parameters or groups; an empty group is allowed (a pipeline stage may train nothing).
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        adam_w_mode: must be True; the argument is FusedAdam's.
        capturable: must be False; FusedAdam's too, which Megatron-Core passes since 0.19.

    Raises:
        ValueError: ``adam_w_mode`` is False, or ``capturable`` is True.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is supported")
        if capturable:
            raise ValueError("steps inside a CUDA graph (optimizer_cuda_graph) are not supported")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "Megatron-Core calls step() without a closure"
        for group in self.param_groups:
            # A loaded checkpoint may hold the step as a tensor.
            group["step"] = int(group["step"]) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            # The functional form adds one to each step it is given; one tensor, and one kernel, for all of them.
            before = list(torch.full((len(params),), group["step"] - 1.0, device=params[0].device).unbind())
            adamw(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                before,
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def install() -> None:
    """Make Megatron-Core use :class:`AdamW` where it found neither Transformer Engine nor Apex."""
    import megatron.core.optimizer as optimizer  # noqa: PLC0415  (not before prepare_device)
    from megatron.core.optimizer import distrib_optimizer  # noqa: PLC0415

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = AdamW
        distrib_optimizer.Adam = AdamW
        # "The state has FusedAdam's layout."
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
        optimizer.USING_PYTORCH_OPTIMIZER = False
