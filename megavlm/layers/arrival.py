"""Weights of modules that nobody calls, while the optimizer's new weights are still on their way to all replicas."""

from __future__ import annotations

from torch import nn


def wait_for_weights(*modules: nn.Module) -> None:
    """Wait for the own weights of modules whose parameters are read where the modules are not called.

    With ``parallel.overlap_param_gather`` Megatron-Core waits for a bucket of weights in the forward pre-hook of each
    module that has some of them (``DistributedDataParallel._make_forward_pre_hook``); a call would run it, reading a
    parameter does not. Without such hooks nothing happens.
    """
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            hook(module, ())
