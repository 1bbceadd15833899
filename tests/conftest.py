"""Prepare the device once, before any test module imports Megatron-Core."""

from megavlm.parallel.device import prepare_device

prepare_device()
