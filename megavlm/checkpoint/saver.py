"""Saving a run: Megatron-Core plans what each rank writes, a thread may write it, and what is published is whole.

A checkpoint is written as ``step-00000123.ID.partial``. When all ranks are done, a manifest with the digest of every
file is added, the directory gets its name, and the file ``latest`` is replaced; only then are older ones deleted.
Whatever fails, fails on all ranks: the partial directory is removed and the checkpoint before it stays. So it is if
what is in the files is not what the ranks have in memory (:mod:`megavlm.checkpoint.proof`).

An asynchronous save copies the rank's share to host memory first, so that training may go on and change it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch.distributed.checkpoint.api import CheckpointException

from megavlm import __version__
from megavlm.architectures.adapters import trained_keys
from megavlm.checkpoint import adapters, assets, base, manifest, optimizer_state
from megavlm.checkpoint import proof as proving
from megavlm.checkpoint.paths import latest, newest_first, step_directory
from megavlm.checkpoint.placement import misplaced
from megavlm.checkpoint.safe import behind
from megavlm.checkpoint.slots import METADATA, model_state
from megavlm.config.errors import MachineError, disk_problem
from megavlm.parallel.faults import fault
from megavlm.parallel.lock import LockView
from megavlm.parallel.megatron_versions import plan_save
from megavlm.parallel.state import agreed, any_rank, is_reader
from megavlm.weights.pickles import first_line

logger = logging.getLogger(__name__)


@dataclass
class State:
    """What a checkpoint of a run holds."""

    modules: Sequence[Any]
    """The bare model chunks of this rank."""
    optimizer: Any = None
    """Megatron-Core's optimizer; None saves weights alone."""
    scheduler: Any = None
    """Megatron-Core's scheduler, saved with the optimizer."""
    reader: Any = None
    """On reader ranks, the plain structure that the data feed goes on from."""
    random: Any = None
    """This rank's random states, JSON-able."""
    run: dict[str, Any] = field(default_factory=dict)
    """JSON-able facts of the run, with at least ``step``."""
    recipe_yaml: str = ""
    """The resolved recipe."""
    parent: Path | None = None
    """Checkpoint that the run went on from, whose ``hf`` folder this one inherits."""
    tokenizer: Path | None = None
    """Tokenizer file to keep there if there is no such folder."""
    base: Path | None = None
    """Checkpoint of the weights that the model's adapters are for; only what learns is saved then."""


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's strategy, whose finalisation cannot fail on the first rank alone."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=2)  # Megatron-Core 0.16's default; 0.19's is 1
        self.writer: FileSystemWriterAsync | None = None
        self.index_error: Exception | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *rest: Any) -> Any:
        write_index = writer.finish

        def finish(metadata: Any, results: Any) -> None:
            # The other ranks wait in a collective, which an error here would leave them in.
            try:
                write_index(metadata, results)
            except OSError as error:
                self.index_error = error

        self.writer, writer.finish = writer, finish
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, *rest)


@dataclass
class _PendingCheckpoint:
    """A checkpoint that is being written."""

    partial: Path
    final: Path
    strategy: _Strategy
    request: Any
    results: queue.SimpleQueue[Any]
    live: set[int]
    """Where memory lies that training will change."""
    witness: proving.Witness | None
    proof: proving.Proof | None = None
    claimed: threading.Event = field(default_factory=threading.Event)
    """The proof has this rank's claims: what they are about may change."""
    unhook: Callable[[], None] = lambda: None
    digests: manifest.Files = field(default_factory=dict)
    failure: Exception | None = None
    """What this rank's writing ran into."""
    thread: threading.Thread | None = None


class Saver:
    """Writes and publishes the checkpoints of a run.

    Args:
        root: directory of the run's checkpoints.
        keep: newest checkpoints to leave there.
        asynchronous: write in a thread while training goes on; :meth:`poll` publishes.
        lock: of the run's directory; once it is lost, nothing is written or removed there any more.
        proven: compare what is in the files with what the ranks have in memory; without, a checkpoint does not have
            the mark of a proven one.
        needed: checkpoints that must not be deleted yet, though there are newer ones; asked on the first rank.
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        *,
        asynchronous: bool = False,
        lock: LockView | None = None,
        proven: bool = True,
        needed: Callable[[], set[Path]] = set,
    ) -> None:
        self.root, self.keep, self.asynchronous, self.lock, self.proven = root, keep, asynchronous, lock, proven
        self._needed = needed
        self._job: _PendingCheckpoint | None = None
        self.stalled_seconds = 0.0
        """Time that the last save kept training waiting."""

    def save(self, state: State, *, wait: bool = False) -> Path | None:
        """Save; a collective over all ranks.

        Args:
            state: what to save; it may be changed as soon as this returns.
            wait: publish before returning, though saves are asynchronous.

        Returns:
            The published directory, or None where a thread still writes it.

        Raises:
            OSError, RuntimeError: it could not be written, on some rank. Nothing is left of it.
        """
        self.finish()
        start = time.perf_counter()
        job = self._prepare(state)
        self._job = job
        if self.asynchronous and not wait:
            buckets = _snapshot(job.request.preload_fn, job.live)
            job.unhook = proving.until(job.claimed, state.optimizer)
            job.thread = threading.Thread(target=self._write, args=(job, buckets), name="megavlm-save", daemon=True)
            job.thread.start()
            self.stalled_seconds = time.perf_counter() - start
            return None
        self._write(job, job.request.preload_fn() if job.request.preload_fn is not None else [])
        path = self._publish()
        self.stalled_seconds = time.perf_counter() - start
        return path

    def poll(self) -> Path | None:
        """Publish the checkpoint that a thread has written, once all ranks have; a collective while there is one.

        Raises:
            OSError, RuntimeError: as :meth:`save`.
        """
        job = self._job
        if job is None or any_rank(job.thread is not None and job.thread.is_alive()):
            return None
        return self._publish()

    def finish(self) -> Path | None:
        """Wait until nothing is being written any more and publish it; a collective.

        Raises:
            OSError, RuntimeError: as :meth:`save`.
        """
        if self._job is None:
            return None
        if self._job.thread is not None:
            self._job.thread.join()
        return self._publish()

    def point_at(self, checkpoint: Path) -> None:
        """Let ``latest`` name the checkpoint that the run goes on from, so that everybody means the same one."""
        pointer = self.root / "latest"
        if dist.get_rank() != 0 or (
            pointer.is_file() and pointer.read_text(encoding="utf-8").strip() == checkpoint.name
        ):
            return
        try:
            manifest.replace_text(pointer, checkpoint.name + "\n")
        except OSError as error:  # the next save writes it again, and fails on all ranks if it must
            logger.warning("%s cannot be written: %s", pointer, error)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._job is not None

    def _prepare(self, state: State) -> _PendingCheckpoint:
        """Plan what each rank writes, and write the small files."""
        final = step_directory(self.root, state.run["step"])
        # With the lock's name in it: a run that lost its lock in the middle of a save cannot write into another's.
        partial = final.with_suffix(f".{self.lock.token[:8]}.partial" if self.lock is not None else ".partial")
        with _removed_on_error(partial, self.lock), agreed(f"saving {final.name}"):
            self._check_lock()
            fault("checkpoint.start")
            if dist.get_rank() == 0:
                self.root.mkdir(parents=True, exist_ok=True)
                for leftover in self.root.glob("*.partial"):
                    shutil.rmtree(leftover)
                partial.mkdir()
        with _removed_on_error(partial, self.lock):
            sharded, common, witness = self._describe(state, final.name)
        with _removed_on_error(partial, self.lock), agreed(f"saving {final.name}"):
            self._check_lock()
            _write_small(partial, state, common)
        # Megatron-Core would start a server process for the results of the processes that it forks; here is neither.
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        filesystem_async._results_queue = results
        strategy = _Strategy()
        with (
            _removed_on_error(partial, self.lock),
            _whole(final.name),
            agreed(f"saving {final.name}"),
            proving.losses_are_errors(),
        ):
            request = plan_save(strategy, sharded, partial)
        return _PendingCheckpoint(partial, final, strategy, request, results, _live(state), witness)

    def _describe(self, state: State, name: str) -> tuple[Any, Any, proving.Witness | None]:
        """Return what Megatron-Core is to write, what goes into the common file, and who can prove it.

        Raises:
            ProofError: that is not the model and its optimizer.
        """
        only, described = None, None
        with _whole(name), agreed(f"saving {name}"):
            tensors = model_state(state.modules)
            if state.base is not None:
                only = {key for module in state.modules for key in trained_keys(module)}
                tensors = adapters.select(tensors, lambda key, _: key in only)
            proving.raise_first(list(misplaced(state.modules, tensors, only)))
        with _whole(name), agreed(f"saving {name}"), proving.losses_are_errors():
            if state.optimizer is not None:
                described = optimizer_state.describe(state.optimizer, tensors)
            witness = proving.Witness(tensors, state.optimizer, described) if self.proven else None
            if state.optimizer is not None:
                tensors["optimizer"] = described
                tensors["scheduler"] = state.scheduler.state_dict()
            tensors["content_metadata"] = dict(METADATA)
            force_all_tensors_to_non_fp8(tensors)  # a checkpoint says nothing of the kernels that it was trained with
        with _whole(name), agreed(f"saving {name}"), proving.losses_are_errors():
            sharded, common = save_preprocess(tensors, True)
            if witness is not None:
                witness.examine(sharded)
        return sharded, common, witness

    def _write(self, job: _PendingCheckpoint, buckets: Sequence[Any]) -> None:
        """Write this rank's shards and digest them; errors are kept for :meth:`_publish`."""
        parts: dict[int, Any] = {}
        written: dict[int, Any] | Exception = parts
        try:
            if job.witness is not None:
                job.proof, job.witness = job.witness.testify(), None
            job.claimed.set()
            for i, bucket in enumerate(buckets):
                self._check_lock()
                answer = _Answer()
                transforms = [job.strategy.writer.transforms] if job.strategy.writer is not None else []
                FileSystemWriterAsync.write_preloaded_data(transforms, i, bucket, answer, answer, use_fsync=True)
                if isinstance(answer.result, Exception):
                    raise behind(answer.result)
                parts[i] = answer.result
                fault("checkpoint.in_shard")
                job.digests[bucket[1]] = manifest.digest(job.partial / bucket[1])
            fault("checkpoint.after_shards")
            if job.proof is not None:
                results = {result.index: result for part in parts.values() for result in part}
                items = (one for _, _, (_, tensors) in buckets for one in tensors)
                proving.read_back(job.proof, job.partial, [(results[item.index], tensor) for item, tensor in items])
        except Exception as error:
            written = job.failure = error
        finally:
            job.claimed.set()
        if buckets:
            job.results.put(written)
        elif isinstance(written, Exception):
            job.strategy.index_error = written

    def _publish(self) -> Path:
        """Make the written checkpoint the newest one; a collective."""
        job, self._job = self._job, None
        assert job is not None
        job.unhook()
        with _removed_on_error(job.partial, self.lock):
            try:
                for finalize in job.request.finalize_fns:
                    finalize()
            except CheckpointException as error:  # raised on all ranks; what it says of the causes is but their text
                with agreed(f"writing {job.final.name}"):
                    if job.failure is not None:
                        raise _unwritten(job.final, job.failure) from job.failure
                causes = sorted({first_line(cause) for cause, _ in error.failures.values()})
                raise RuntimeError(
                    f"{job.final.name} could not be written: {'; '.join(causes) or 'see rank 0'}"
                ) from error
            gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object((job.digests, job.proof), gathered)
            with _whole(job.final.name), agreed(f"publishing {job.final.name}"):
                if job.strategy.index_error is not None:
                    raise job.strategy.index_error
                if gathered is not None:
                    known = {name: entry for part, _ in gathered for name, entry in part.items()}
                    if job.proof is not None:
                        proving.verdict([one for _, one in gathered if one is not None])
                    self._publish_directory(job, known)
        logger.info("saved %s", job.final)
        return job.final

    def _publish_directory(self, job: _PendingCheckpoint, known: manifest.Files) -> None:
        self._check_lock()
        save_config(CheckpointingConfig("torch_dist", 1), str(job.partial))
        fault("checkpoint.before_manifest")
        manifest.write_manifest(job.partial, known, proven=job.proof is not None)
        fault("checkpoint.before_publish")
        self._check_lock()
        if job.final.exists():  # the same step again, after going on from an older checkpoint
            job.final.rename(job.final.with_suffix(".old.partial"))
        job.partial.rename(job.final)
        manifest.sync_directory(self.root)
        fault("checkpoint.before_pointer")
        manifest.replace_text(self.root / "latest", job.final.name + "\n")
        fault("checkpoint.before_retention")
        self._delete_old(job.final.name)

    def prune(self) -> None:
        """Delete the checkpoints beyond ``keep`` that nothing needs any more; on the first rank, without the others."""
        newest = latest(self.root)
        if newest is not None and not (self.lock and self.lock.lost()):
            self._delete_old(newest.name)

    def _delete_old(self, newest: str) -> None:
        # Later ones are damaged (else the run would have gone on from them); they do not count as kept.
        up_to_here = [path for path in newest_first(self.root) if path.name <= newest]
        needed = self._needed()
        unneeded = [path for path in up_to_here[self.keep :] if path not in needed]
        set_aside = [*self.root.glob("*.old.partial")]
        # Renamed first: who looks on, or comes after a kill, finds checkpoints that are whole, and none half deleted.
        for old in [*unneeded, *set_aside]:
            try:
                shutil.rmtree(old if old in set_aside else old.rename(old.with_suffix(".old.partial")))
            except OSError as error:  # the new one is published all the same
                logger.warning("%s is not needed any more and cannot be deleted: %s", old, error)

    def _check_lock(self) -> None:
        if self.lock is not None:
            self.lock.check()


def _unwritten(checkpoint: Path, cause: Exception) -> Exception:
    """Return the error of a checkpoint that this rank could not write."""
    problem = disk_problem(cause, checkpoint.parent) if isinstance(cause, OSError) else None
    kind = MachineError if problem is not None or isinstance(cause, MachineError) else RuntimeError
    return kind(f"{checkpoint.name} could not be written: {problem or first_line(cause)}")


class _removed_on_error:  # noqa: N801 - used like a function
    """Remove a partial directory where the block fails; the first rank does, if the directory is still the run's."""

    def __init__(self, partial: Path, lock: LockView | None) -> None:
        self.partial, self.lock = partial, lock

    def __enter__(self) -> None:
        """Nothing yet."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Remove it if there was an error."""
        if isinstance(error, Exception) and dist.get_rank() == 0 and not (self.lock and self.lock.lost()):
            shutil.rmtree(self.partial, ignore_errors=True)


class _Answer:
    """Takes the place of the queues through which Megatron-Core's writer processes answer."""

    result: Any = None

    def put(self, answer: tuple[int, Any]) -> None:
        """Keep the answer."""
        self.result = answer[1]

    def get(self) -> None:
        """The writer says that it has ended."""

    def task_done(self) -> None:
        """The same."""


@contextlib.contextmanager
def _whole(name: str) -> Iterator[None]:
    """Say of which checkpoint it is that something would be lost, and that it does not exist therefore."""
    try:
        yield
    except (proving.ProofError, CheckpointingException) as error:
        raise proving.ProofError(
            f"{name} would not hold what was to be saved, and was not published: {first_line(error)}"
        ) from error


def _live(state: State) -> set[int]:
    """Return where the memory lies that training changes: weights, experts' biases, masters and moments."""
    tensors = [one for module in state.modules for one in (*module.parameters(), *module.buffers())]
    if state.optimizer is not None:
        tensors += [one for _, _, held in optimizer_state.in_memory(state.optimizer) for one in held.values()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def _snapshot(preload: Any, live: set[int]) -> list[Any]:
    """Return this rank's share in host memory of its own: copied where it lies in ``live`` memory.

    What Megatron-Core has gathered is a copy already, and so are tensors that come from a GPU.
    """
    if preload is None:
        return []
    copies = []
    for file_name, storage_key, (objects, tensors) in preload():
        own = [
            (item, tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor)
            for item, tensor in tensors
        ]
        copies.append((file_name, storage_key, (objects, own)))
    return copies


def _write_small(partial: Path, state: State, common: Any) -> None:
    """Write what is no tensor: on the first rank, on readers, and random states on all."""
    if is_reader():
        manifest.write_text(partial / f"reader-{mpu.get_data_parallel_rank()}.json", json.dumps(state.reader))
    if state.random is not None:
        manifest.write_text(partial / f"random-{dist.get_rank()}.json", json.dumps(state.random))
    if dist.get_rank() == 0:
        try:
            with (partial / "common.pt").open("wb") as file:
                torch.save(common, file)
        except RuntimeError as error:
            raise behind(error) from None
        assets.inherit(state.parent, state.tokenizer, partial)
        fault("checkpoint.in_small_files")
        manifest.write_text(partial / "recipe.yaml", state.recipe_yaml)
        if state.base is not None:
            manifest.write_text(partial / base.RECORD, base.record(state.base, partial))
        run = {**state.run, "megavlm": __version__, "world_size": dist.get_world_size()}
        manifest.write_text(partial / "run.json", json.dumps(run, indent=2))
