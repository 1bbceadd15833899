"""One rank of two fails inside ``agreed``; both must leave, with the right message. Run under torchrun."""

from __future__ import annotations

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.tensor_parallel import get_cuda_rng_tracker  # noqa: E402

from megavlm.config.schema import ParallelConfig  # noqa: E402
from megavlm.parallel.state import agreed, any_rank, is_logging_rank, is_reader, process_groups  # noqa: E402


def failure(bad_rank: int | None) -> str:
    """Return what this rank raises when ``bad_rank`` fails, or "none"."""
    try:
        with agreed("the work"):
            if dist.get_rank() == bad_rank:
                raise ValueError("disk full")
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main() -> None:
    """Print one line per rank."""
    with process_groups(ParallelConfig(pipeline_model_parallel_size=2), seed=0):
        rank = dist.get_rank()
        facts = [failure(1), failure(None), str(any_rank(rank == 0)), str(any_rank(False))]
        facts += [str(is_reader()), str(is_logging_rank())]
        with get_cuda_rng_tracker().fork():
            forked = torch.rand(1)
        draws: list[torch.Tensor] = [torch.empty(2) for _ in range(2)]
        dist.all_gather(draws, torch.cat([torch.rand(1), forked]))
        facts.append("draws apart" if (draws[0] != draws[1]).all() else "draws alike")
        print(f"rank {rank}: {' | '.join(facts)}", flush=True)


if __name__ == "__main__":
    main()
