"""Saves that something goes wrong with, on several ranks; started with ``ranks.run``."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe

from megavlm.checkpoint import optimizer_state, proof, saver, slots
from megavlm.checkpoint.distributed import load
from megavlm.checkpoint.manifest import check, is_proven
from megavlm.checkpoint.saver import Saver, State
from megavlm.config.help import to_yaml
from megavlm.data.device_batch import make_batch
from megavlm.parallel.device import local_device
from megavlm.parallel.state import is_first_stage, process_groups
from megavlm.training.build import TrainingModel, build_training
from megavlm.training.step import train_step

Change = Callable[[Any], None]


@contextlib.contextmanager
def described(change: Callable[[list[ShardedTensor]], None]) -> Iterator[None]:
    """Let ``change`` work on what Megatron-Core has made of the optimizer's state."""
    original = saver.save_preprocess

    def preprocess(tensors: Any, check: bool) -> Any:
        sharded, common = original(tensors, check)
        change([one for one in nested_values(sharded) if isinstance(one, ShardedTensor)])
        return sharded, common

    with mock.patch.object(saver, "save_preprocess", preprocess):
        yield


def of(
    tensors: list[ShardedTensor], state: str, end: str = "language.decoder.layers.self_attention.linear_proj.weight"
) -> ShardedTensor:
    """Return the state of one parameter."""
    return next(one for one in tensors if one.key.startswith(f"optimizer.state.{state}.") and one.key.endswith(end))


def rolled(tensors: list[ShardedTensor]) -> None:
    """Shift a moment by one element: its sum is the same."""
    one = of(tensors, "exp_avg")
    one.data = one.data.flatten().roll(1).view(one.data.shape)


def neighbours(tensors: list[ShardedTensor]) -> None:
    """Give two layers each other's moments."""
    key = of(tensors, "exp_avg").key
    one, other = [one for one in tensors if one.key == key][:2]
    one.data, other.data = other.data, one.data


def confused(tensors: list[ShardedTensor]) -> None:
    """Store the first moment as the second."""
    of(tensors, "exp_avg_sq").data = of(tensors, "exp_avg").data


def zeroed(tensors: list[ShardedTensor]) -> None:
    """Store zeros in the place of a master."""
    one = of(tensors, "param")
    one.data = torch.zeros_like(one.data)


def half_of_another_rank(tensors: list[ShardedTensor]) -> None:
    """The last data-parallel rank's share of a moment arrives as zeros on the rank that writes it."""
    for one in tensors:
        if one.key.startswith("optimizer.state.exp_avg.") and dist.get_rank() == 0:
            one.data = one.data.clone()
            one.data.view(-1)[-1:] = 7.0


def weight_bit(tensors: list[ShardedTensor]) -> None:
    """A weight is written with one bit changed."""
    one = next(one for one in tensors if one.key.endswith("linear_proj.weight") and "optimizer" not in one.key)
    one.data = one.data.detach().clone()
    one.data.view(-1)[3] *= 2


def misshapen(tensors: list[ShardedTensor]) -> None:
    """A moment is described as twice as long as its parameter."""
    one = of(tensors, "exp_avg", "final_layernorm.weight")
    one.global_shape = (2 * one.global_shape[0],)


@contextlib.contextmanager
def masters_moved(training: TrainingModel) -> Iterator[None]:
    """The masters say something else than the weights, in memory too."""
    kept = []
    for _, _, held in optimizer_state.in_memory(training.optimizer):
        master = held["param"]
        kept.append((master, master.clone()))
        master.add_(0.25)
    try:
        yield
    finally:
        for master, before in kept:
            master.copy_(before)


@contextlib.contextmanager
def without_padding_fix() -> Iterator[None]:
    """Megatron-Core's own offsets."""
    with mock.patch.object(optimizer_state, "padding_left_out", lambda _: contextlib.nullcontext()):
        yield


@contextlib.contextmanager
def log_of_rank(rank: int) -> Iterator[None]:
    """One rank's Megatron-Core speaks of corruption."""
    original = optimizer_state.describe

    def describe(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == rank:
            logging.getLogger("megatron.core.optimizer.some").warning("X can lead to data corruption.")
        return original(*args, **kwargs)

    with mock.patch.object(optimizer_state, "describe", describe):
        yield


@contextlib.contextmanager
def model_entries(change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Let ``change`` work on the description of the weights."""
    original = saver.model_state

    def state(modules: Any) -> dict[str, Any]:
        found = original(modules)
        change(found["model"])
        return found

    with mock.patch.object(saver, "model_state", state):
        yield


def left_out(entries: dict[str, Any]) -> None:
    """A container forgot a child."""
    for name in [name for name in entries if name.startswith("connector.")][:1]:
        del entries[name]


def another_layer(entries: dict[str, Any]) -> None:
    """Two layers stand in each other's place."""
    first, second = [name for name in entries if name.endswith("self_attention.linear_proj.weight")][-2:]
    offsets = entries[first].global_offset, entries[second].global_offset
    for name, offset in zip((first, second), reversed(offsets), strict=True):
        entries[name] = dataclasses.replace(entries[name], global_offset=offset)


@contextlib.contextmanager
def flipped_in_file(needle: bytes) -> Iterator[None]:
    """A bit of a shard is not what was written, before its digest is taken."""
    original = saver.manifest.digest

    def digest(path: Path) -> dict[str, Any]:
        data = bytearray(path.read_bytes())
        if path.suffix == ".distcp" and needle in data:
            data[data.index(needle) + 5] ^= 1
            path.write_bytes(data)
        return original(path)

    with mock.patch.object(saver.manifest, "digest", digest):
        yield


def numbers(training: TrainingModel) -> bytes:
    """Return the bytes of a weight."""
    weight = training.modules[0].vision.conv1.weight.detach().flatten()
    return weight.view(torch.uint8).numpy().tobytes()


def exchanged(entries: dict[str, Any]) -> None:
    """Each tensor-parallel rank stores its part in the other's place."""
    name = next(name for name in entries if name.endswith("self_attention.linear_proj.weight"))
    entry = entries[name]
    *first, last = entry.global_offset
    other = (entry.global_shape[-1] - entry.local_shape[-1]) - last
    entries[name] = dataclasses.replace(entry, global_offset=(*first, other))


@contextlib.contextmanager
def containers_not_asked(training: TrainingModel) -> Iterator[None]:
    """Megatron-Core's own way with a container: a leaf."""
    methods = []
    for module in training.modules[0].modules():
        if "sharded_state_dict" in vars(module):
            methods.append((module, vars(module).pop("sharded_state_dict")))

    def sharded_state(module: Any, prefix: str = "", metadata: Any = None) -> Any:
        return module.sharded_state_dict(prefix=prefix, metadata=metadata)

    try:
        with mock.patch.object(slots, "sharded_state", sharded_state):
            yield
    finally:
        for module, method in methods:
            module.sharded_state_dict = method


FAULTS: dict[str, Callable[[TrainingModel], Any]] = {
    "rolled": lambda _: described(rolled),
    "neighbours": lambda _: described(neighbours),
    "confused": lambda _: described(confused),
    "zeroed": lambda _: described(zeroed),
    "another rank": lambda _: described(half_of_another_rank),
    "weight": lambda _: described(weight_bit),
    "misshapen": lambda _: described(misshapen),
    "masters": masters_moved,
    "padding": lambda _: without_padding_fix(),
    "log": lambda _: log_of_rank(1),
    "left out": lambda _: model_entries(left_out),
    "layers": lambda _: model_entries(another_layer),
    "file": lambda training: flipped_in_file(numbers(training)),
    "header": lambda _: flipped_in_file(b"_rebuild_tensor_v2"),
}


AT_TP: dict[str, Callable[[TrainingModel], Any]] = {
    "container": containers_not_asked,
    "exchanged": lambda _: model_entries(exchanged),
}


def trained(recipe: dict[str, Any], steps: int = 2) -> tuple[TrainingModel, Any]:
    """Build and take some steps."""
    tree = tiny_recipe(**recipe)
    training = build_training(tree, IMAGE_TOKEN)
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    for step in range(steps):
        mine = random_packs(tree.training.global_batch_size, seed=step)[rank::size]
        batches = [
            make_batch(pack, torch.from_numpy(pixels) if is_first_stage() else None, local_device())
            for pack, pixels in mine
        ]
        training.scheduler.step(1)
        train_step(training.chunks, training.optimizer, batches, num_sources=1)
    return training, tree


def step_while_claims_are_taken(recipe: dict[str, Any], root: str) -> tuple[list[bool], list[str]]:
    """Take steps behind an asynchronous save; return whether each update found the claims taken, and what is there.

    The claims are of what was saved, so the update must wait for them: they are taken once it has begun.
    """
    begun, taken, original = threading.Event(), threading.Event(), proof.Witness.testify
    found_taken: list[bool] = []

    def testify(witness: proof.Witness) -> proof.Proof:
        assert begun.wait(600), "no update begins"
        time.sleep(0.2)  # in which an update that does not wait would be through
        found = original(witness)
        taken.set()
        return found

    tree = tiny_recipe(**recipe)
    with process_groups(tree.parallel, 1):
        training, _ = trained(recipe)
        inner = [one.optimizer for one in getattr(training.optimizer, "chained_optimizers", [training.optimizer])]
        for one in inner:  # hooks are called in the order in which they were given: here, the save's, the last
            one.register_step_pre_hook(lambda *_: begun.set())
        keeper = Saver(Path(root), keep=9, asynchronous=True)
        with mock.patch.object(proof.Witness, "testify", testify), training.settled():
            keeper.save(State(training.modules, training.optimizer, training.scheduler, run={"step": 2}))
            for one in inner:
                one.register_step_pre_hook(lambda *_: found_taken.append(taken.is_set()))
            (pack, pixels), *_ = random_packs(1)
            batch = make_batch(pack, torch.from_numpy(pixels), local_device())
            train_step(training.chunks, training.optimizer, [batch], num_sources=1)
            keeper.finish()
            train_step(training.chunks, training.optimizer, [batch], num_sources=1)  # waits for nobody any more
    return found_taken, sorted(path.name for path in Path(root).iterdir())


def faults(recipe: dict[str, Any], root: str, names: list[str], *, asynchronous: bool = False) -> dict[str, str]:
    """Save once as it should be, then with each of the faults, and once more well; return what was raised.

    Nothing of a save that failed may be left, and the checkpoint before it must be whole.
    """
    said = {}
    with process_groups(tiny_recipe(**recipe).parallel, 1):
        training, _ = trained(recipe)
        keeper = Saver(Path(root), keep=9, asynchronous=asynchronous)

        def save(step: int) -> None:
            with training.settled():
                keeper.save(State(training.modules, training.optimizer, training.scheduler, run={"step": step}))
            keeper.finish()

        save(1)
        for name in names:
            try:
                with {**FAULTS, **AT_TP}[name](training):
                    save(2)
            except RuntimeError as error:
                said[name] = f"{type(error).__name__}: {error}"
            dist.barrier()
            left = sorted(path.name for path in Path(root).iterdir())
            assert left == ["latest", "step-00000001"], (name, left)
            dist.barrier()
        check(Path(root) / "step-00000001")
        save(3)
        assert (Path(root) / "latest").read_text() == "step-00000003\n" and is_proven(Path(root) / "step-00000003")
    return said


def save_as_before(recipe: dict[str, Any], root: str) -> None:
    """Train two steps and save as versions did whose saves proved nothing, with both of their faults."""
    nothing = contextlib.nullcontext
    with (
        process_groups(tiny_recipe(**recipe).parallel, 1),
        mock.patch.object(saver, "misplaced", lambda *_: ()),
        mock.patch.object(saver.proving, "losses_are_errors", nothing),
        without_padding_fix(),
    ):
        training, tree = trained(recipe)
        with containers_not_asked(training), training.settled():
            state = State(training.modules, training.optimizer, training.scheduler, run={"step": 2})
            state.recipe_yaml = to_yaml(tree)
            Saver(Path(root), keep=9, proven=False).save(state)


def loaded(recipe: dict[str, Any], checkpoint: str, *, state: bool) -> str:
    """Load a checkpoint, with or without the optimizer's state; return what is said against it."""
    tree = tiny_recipe(**recipe)
    with process_groups(tree.parallel, 1):
        training = build_training(tree, IMAGE_TOKEN)
        extra = {"optimizer": training.optimizer, "scheduler": training.scheduler} if state else {}
        try:
            load(Path(checkpoint), modules=training.modules, **extra)
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def run_with_a_bad_save(words: list[str], step: int) -> tuple[int | None, str]:
    """Train as the command does, with a shifted moment in the save of one step; return exit code and error."""

    from megavlm.commands.train import train
    from megavlm.config.load import load_recipe
    from megavlm.families.presets import expand_presets

    original = saver.save_preprocess

    def preprocess(tensors: Any, check: bool) -> Any:
        sharded, common = original(tensors, check)
        if tensors["scheduler"]["num_steps"] == step:
            rolled([one for one in nested_values(sharded) if isinstance(one, ShardedTensor)])
        return sharded, common

    recipe = load_recipe(words[0], words[1:], expand_presets)
    with mock.patch.object(saver, "save_preprocess", preprocess):
        try:
            return train(recipe), ""
        except RuntimeError as error:
            return None, str(error)
