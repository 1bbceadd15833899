"""Runs Megatron-Core's real schedules and writes in which order each rank makes its calls. Run under torchrun.

Arguments: a JSON file with the cases (``pipeline``, ``virtual``, ``microbatches``), and the file to write: for each
case a list per pipeline rank of [kind, chunk, micro-batch].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from tiny import IMAGE_TOKEN, SEQUENCE_LENGTH, random_packs, tiny_recipe  # noqa: E402

from megavlm.data.device_batch import Batch, share_packs  # noqa: E402
from megavlm.data.read_pack import ReadPack  # noqa: E402
from megavlm.models.build import unwrap  # noqa: E402
from megavlm.parallel.pipeline import run  # noqa: E402
from megavlm.parallel.state import is_reader, process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.spread import PictureSpread  # noqa: E402
from megavlm.training.step import forward_step  # noqa: E402

Call = tuple[str, int, int]


def run_case(pipeline: int, virtual: int | None, microbatches: int, placement: str) -> list[Call]:
    """Take one forward and backward pass over all micro-batches; return this rank's calls in their order."""
    parallel = {"pipeline_model_parallel_size": pipeline, "virtual_pipeline_model_parallel_size": virtual}
    parallel["vision_placement"] = placement
    model = {"language": {**tiny_recipe().model.language.__dict__, "num_layers": pipeline * (virtual or 1)}}
    recipe = tiny_recipe(parallel=parallel, model={"preset": "tiny", **model})
    calls: list[Call] = []
    with process_groups(recipe.parallel, recipe.training.seed):
        training = build_training(recipe, IMAGE_TOKEN)
        chunks, vision = training.chunks, training.vision
        read = [ReadPack(pack, torch.from_numpy(pixels)) for pack, pixels in random_packs(microbatches)]
        spread = None if vision is None else PictureSpread(recipe)
        batches = share_packs(read if is_reader() else None, microbatches, spread)
        if vision is not None:

            def encoded(*given: Any) -> None:
                calls.append(("E", 0, 0))
                given[-1].register_hook(lambda _: calls.append(("R", 0, 0)))

            vision.chunk.connector.register_forward_hook(encoded)
            batches = vision.encode(batches, backward=True)
        done = [0] * len(chunks)

        def recorded(chunk: Any, batch: Batch) -> Any:
            at = unwrap(chunk).vp_stage or 0
            number, done[at] = done[at], done[at] + 1
            calls.append(("F", at, number))
            output, loss = forward_step(chunk, batch, num_sources=1)
            output.register_hook(lambda _: calls.append(("B", at, number)))  # as its backward pass begins
            return output, loss

        run(chunks, batches, recorded, SEQUENCE_LENGTH, backward=True)
        everyone: list[Any] = [None] * pipeline
        dist.all_gather_object(everyone, calls, group=mpu.get_pipeline_model_parallel_group())
    return everyone


def main() -> None:
    """Run the cases one after the other."""
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = [run_case(**case) for case in cases]
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
