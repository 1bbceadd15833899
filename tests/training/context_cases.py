"""What ranks that share a pack hold, say and do; see test_context."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from saved_tensors import saved_tensors  # noqa: E402
from tiny import IMAGE_TOKEN, tiny_recipe  # noqa: E402

from megavlm.data.batch import make_pack  # noqa: E402
from megavlm.data.device_batch import context_length, make_batch  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402
from megavlm.parallel.state import process_groups, replica_group  # noqa: E402
from megavlm.planning.activations import held_by  # noqa: E402
from megavlm.planning.layout import layout_of  # noqa: E402
from megavlm.planning.workload import assume_workload  # noqa: E402


def kept(branches: dict[str, Any], lengths: list[int], gpus: int) -> dict[str, Any]:
    """Return the bytes that a forward pass of samples of such lengths keeps on this rank, really and as planned.

    With them, what each language layer keeps that none before it did (where none is recomputed), and after how many
    minutes its replica's collectives give up.
    """
    recipe, total = tiny_recipe(**branches), sum(lengths)
    with process_groups(recipe.parallel, recipe.training.seed):
        model = build_model(recipe, IMAGE_TOKEN)[0]
        rng = np.random.default_rng(0)
        samples = [rng.integers(0, IMAGE_TOKEN, length) for length in lengths]
        pack = make_pack(samples, total, labels=samples)
        batch = make_batch(
            pack, torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.device("cpu"),
            length=context_length([pack.cu_seqlens]),
        )  # fmt: skip
        with saved_tensors(model.parameters()) as saved:
            layers = unwrap(model).language.decoder.layers
            seen: list[int] = []
            for layer in layers:
                layer.register_forward_pre_hook(lambda *_: seen.append(saved.bytes))
            layers[-1].register_forward_hook(lambda *_: seen.append(saved.bytes))
            unwrap(model)(**batch.inputs(with_labels=True))
        layout = layout_of(recipe, gpus)
        load = assume_workload(recipe, 0, len(lengths)).of_rank(layout.context)
        held = held_by(recipe, layout, layout.chunks[0], load.tokens, 0)
        patience = replica_group()._get_backend(torch.device("cpu")).options._timeout
        minutes = round(patience.total_seconds() / 60)
        return {
            "real": saved.bytes, "planned": held.kept, "tokens": batch.length, "minutes": minutes,
            "layers": [after - before for before, after in pairwise(seen)],
        }  # fmt: skip
