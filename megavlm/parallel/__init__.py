"""Everything that depends on the hardware: CUDA or CPU over gloo, process groups, locks, processes."""
