"""The converters at full size, each way, against ``cp`` of the same bytes: time, memory, and every bit.

The weights are random: a directory in the layout and size of Belle-VL-14B (Qwen-14B, the 448 px tower, resampler) is
made shard by shard, each tensor from its name, so that what comes back can be compared without a second copy on disk.
All files are flushed to disk within the times, cp's too, and every timed phase starts with a page cache that is cold,
where the system lets this process drop it, and full of something else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "models"))

import torch  # noqa: E402
from qwen_reference import Sizes, shapes  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch import Tensor  # noqa: E402

FULL = Sizes(
    vocab=152064, hidden=5120, layers=40, heads=40, ffn=13696, image=448, patch=14, width=1664, vision_layers=48,
    vision_heads=16, vision_ffn=8192, queries=256, rows=256, image_token=151857,
)  # fmt: skip
TINY = Sizes(
    vocab=512, hidden=256, layers=2, heads=2, ffn=512, image=56, patch=14, width=96, vision_layers=2, vision_heads=4,
    vision_ffn=472, queries=16, rows=256, image_token=505,
)  # fmt: skip
SHARD_BYTES = 2_000_000_000
BLOCK = (1 << 22) - 3
"""Length of the block of random numbers that all tensors are cut from: a prime, so that no two rows are the same."""
SPARE_BYTES = 1 << 30
"""What stays free on the disk."""
SAMPLE_SECONDS = 0.05
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
PACKAGES = ("torch", "safetensors", "megatron-core")


def config(s: Sizes) -> dict[str, Any]:
    """Return the ``config.json`` of such a model."""
    return {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "torch_dtype": "bfloat16", "bf16": True,
        "fp16": False, "fp32": False, "use_flash_attn": False, "use_cache": True,
        "vocab_size": s.vocab, "hidden_size": s.hidden, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
        "intermediate_size": 2 * s.ffn, "kv_channels": s.hidden // s.heads, "layer_norm_epsilon": 1e-6,
        "rotary_pct": 1.0, "rotary_emb_base": 10000, "use_dynamic_ntk": True, "use_logn_attn": True,
        "seq_length": 2048, "max_position_embeddings": 8192, "scale_attn_weights": True, "no_bias": True,
        "tie_word_embeddings": False, "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "initializer_range": 0.02,
        "visual": {
            "heads": s.vision_heads, "image_size": s.image, "image_start_id": s.image_token, "layers": s.vision_layers,
            "mlp_ratio": round(s.vision_ffn / s.width + 5e-5, 4), "n_queries": s.queries, "output_dim": s.hidden,
            "patch_size": s.patch, "width": s.width,
        },
    }  # fmt: skip


def size_bytes(s: Sizes) -> int:
    """Return the bytes of such a model in bf16."""
    return sum(2 * torch.Size(shape).numel() for shape in shapes(s).values())


def fitting(s: Sizes, free: int) -> Sizes:
    """Return the sizes, with as few layers less as the disk asks for: a directory and one more of its size."""
    for layers in range(s.layers, 0, -1):
        smaller = dataclasses.replace(s, layers=layers, vision_layers=max(1, s.vision_layers * layers // s.layers))
        if 2 * size_bytes(smaller) + SPARE_BYTES <= free:
            return smaller
    raise SystemExit(f"not even one layer fits into {free / 1e9:.1f} GB of free disk; give another --work")


class Weights:
    """Random bf16 tensors of shapes by name, which can be made again from their names: each is a cut of one block."""

    def __init__(self, found: Mapping[str, Sequence[int]]) -> None:
        self.shapes = dict(found)
        bits = torch.randint(
            -(1 << 15), 1 << 15, (BLOCK,), dtype=torch.int16, generator=torch.Generator().manual_seed(1)
        )
        self.block = bits & ~0x4000  # a bit of the exponent stays 0: neither infinities nor NaNs

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield the bits of a tensor, flat, as views of the block."""
        left, start = torch.Size(self.shapes[name]).numel(), zlib.crc32(name.encode()) % BLOCK
        while left:
            part = self.block[start : start + left]
            yield part
            left, start = left - len(part), 0

    def shards(self, shard_bytes: int) -> list[list[str]]:
        """Return the names of each file."""
        groups: list[list[str]] = [[]]
        filled = 0
        for name, shape in self.shapes.items():
            size = 2 * torch.Size(shape).numel()
            if groups[-1] and filled + size > shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += size
        return groups

    def write(self, directory: Path, shard_bytes: int) -> None:
        """Write safetensors files with their index."""
        groups = self.shards(shard_bytes)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(groups):
            file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
            weight_map |= dict.fromkeys(names, file)
            header, offset = {}, 0
            for name in names:
                stop = offset + 2 * torch.Size(self.shapes[name]).numel()
                header[name] = {"dtype": "BF16", "shape": self.shapes[name], "data_offsets": [offset, stop]}
                offset = stop
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with (directory / file).open("wb") as out:
                out.write(struct.pack("<Q", len(text)) + text)
                for name in names:
                    for part in self.parts(name):
                        out.write(part.numpy().tobytes())
        index = {"metadata": {"total_size": sum(2 * torch.Size(x).numel() for x in self.shapes.values())}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": weight_map}))

    def check(self, directory: Path) -> int:
        """Compare every tensor of a directory, file by file; return how many there are.

        Raises:
            SystemExit: one differs, is missing, or is too many.
        """
        seen: set[str] = set()
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - no mapping
                    tensor = handle.get_tensor(name)
                    if tensor.dtype is not torch.bfloat16 or tuple(tensor.shape) != self.shapes.get(name):
                        raise SystemExit(f"{file}: {name} is a {tensor.dtype} of {tuple(tensor.shape)}")
                    flat, start = tensor.view(-1).view(torch.int16), 0
                    for part in self.parts(name):
                        if not torch.equal(flat[start : start + len(part)], part):
                            raise SystemExit(f"{file}: {name} has other bits than it had in the beginning")
                        start += len(part)
                    seen.add(name)
        if seen != set(self.shapes):
            raise SystemExit(f"{directory}: lacks {len(set(self.shapes) - seen)} tensors")
        return len(seen)


@dataclass(frozen=True)
class Phase:
    """What one timed command took."""

    seconds: float
    cpu_seconds: float
    """Of the command, user and system."""
    others: float
    """Cores that everything else on the machine kept busy meanwhile, the kernel's writers among it."""
    flush_seconds: float = 0.0
    """Within ``seconds``: flushing to disk after the command. The converters flush by themselves."""
    anonymous: int = 0
    """Peak of anonymous and shared memory, in bytes; mapped files are page cache."""
    resident: int = 0
    """Peak of all resident memory, mapped files included (VmHWM)."""


def _busy_seconds() -> float:
    """Return processor seconds spent by the whole machine since it started."""
    user, nice, system, _, _, interrupts, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def _memory(pid: int) -> dict[str, int]:
    """Return the memory of a process, in bytes; nothing when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split(":", 1) for line in lines)
    return {key: int(value.split()[0]) << 10 for key, value in fields if key[:2] in ("Vm", "Rs")}


def _flush(directory: Path) -> None:
    """Do what ``publishing`` does: flush every file and directory."""
    for root, _, files in os.walk(directory):
        for path in (*(Path(root) / name for name in files), Path(root)):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def cool(work: Path, *, keep: bool) -> None:
    """Drop the page cache, and fill what is free of the memory with pages of a file that nobody reads.

    Virtual machines return free memory to their host, and taking it again costs several times what a copy does: the
    command that comes first, or that starts fastest, would look good.
    """
    if keep:
        return
    os.sync()
    if os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("1")
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in meminfo if line.startswith("MemFree"))
    buffer = bytearray(1 << 20)
    with (work / "hole").open("wb+", buffering=0) as hole:  # a file without blocks: it takes memory only
        hole.truncate(free)
        while hole.readinto(buffer):
            pass


def timed(command: list[str], flush: Path | None = None) -> Phase:
    """Run a command and watch its memory.

    Raises:
        SystemExit: it failed.
    """
    busy, own, start = _busy_seconds(), _own_seconds(), time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    anonymous = resident = 0
    try:
        while True:
            memory = _memory(process.pid)
            anonymous = max(anonymous, memory.get("RssAnon", 0) + memory.get("RssShmem", 0))
            resident = max(resident, memory.get("VmHWM", 0))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLE_SECONDS)
                break
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)}: exit code {process.returncode}")
    ended = time.perf_counter()
    if flush is not None:
        _flush(flush)
    now = time.perf_counter()
    cpu = _own_seconds() - own
    others = max(0.0, _busy_seconds() - busy - cpu) / (now - start)
    return Phase(now - start, cpu, others, now - ended, anonymous, resident)


def directory_bytes(directory: Path) -> int:
    """Return the bytes of all files."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def measure(
    weights: Weights, files: Mapping[str, Mapping[str, Any]], work: Path, *, shard_bytes: int, keep_caches: bool
) -> dict[str, Any]:
    """Run everything in the empty directory ``work``; two of the big directories exist at a time.

    Args:
        weights: of the model.
        files: the small JSON files beside them, ``config.json`` among them.
        work: where to.
        shard_bytes: largest size of a made file.
        keep_caches: do not drop the page cache.
    """
    source, megatron, back, copy = (work / name for name in ("hf", "megatron", "back", "copy"))
    tools = ROOT / "tools" / "checkpoint_convert"
    phases: dict[str, dict[str, Phase]] = {"hf_to_megatron": {}, "megatron_to_hf": {}}
    sizes = {}

    def run(way: str, name: str, command: list[str], made: Path, flush: Path | None = None) -> None:
        shutil.rmtree(made, ignore_errors=True)
        cool(work, keep=keep_caches)
        phases[way][name] = phase = timed(command, flush)
        print(f"{way}: {name}: {phase.seconds:.1f} s", file=sys.stderr, flush=True)

    def both(way: str, given: Path, option: str, made: Path) -> None:
        run(way, "cp", ["cp", "-r", str(given), str(copy)], copy, flush=copy)
        shutil.rmtree(copy)
        command = [sys.executable, str(tools / f"{way}.py"), option, str(given), "--out", str(made)]
        run(way, "not verified", [*command, "--no-verify"], made)
        run(way, "verified", command, made)
        sizes[way] = directory_bytes(given)

    source.mkdir()
    start = time.perf_counter()
    weights.write(source, shard_bytes)
    for name, content in files.items():
        (source / name).write_text(json.dumps(content, indent=2))
    _flush(source)
    synthesis = time.perf_counter() - start
    print(f"made {directory_bytes(source) / 1e9:.1f} GB in {synthesis:.1f} s", file=sys.stderr, flush=True)
    both("hf_to_megatron", source, "--hf", megatron)
    shutil.rmtree(source)
    both("megatron_to_hf", megatron, "--megatron", back)
    shutil.rmtree(megatron)
    tensors = weights.check(back)
    same = json.loads((back / "config.json").read_text()) == files["config.json"]
    return {
        "synthesis_seconds": synthesis,
        "bytes": sizes,
        "identical_tensors": tensors,
        "same_config": same,
        **{way: {name: dataclasses.asdict(one) for name, one in each.items()} for way, each in phases.items()},
    }


def machine(work: Path) -> dict[str, Any]:
    """Return what the numbers were taken on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "cpu": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_disk_bytes": shutil.disk_usage(work).free,
        "load_average_before": os.getloadavg()[0],
        "niceness": os.nice(0),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
    }


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of a result."""
    s = result["sizes"]
    less = "" if result["asked"] == s else (
        f" The disk is too small for what was asked, {result['asked']['layers']} + {result['asked']['vision_layers']} "
        "layers: this is the largest that fits."
    )  # fmt: skip
    layers = f"{s['layers']} + {s['vision_layers']} layers (language + vision), hidden size {s['hidden']}"
    return table_of(result, layers, less)


def table_of(result: dict[str, Any], model: str, less: str = "") -> str:
    """Return the Markdown of a result of a model in words; ``less``: what of it was left out."""
    where = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items())
    cache = {
        "kept": "as the phase before left it",
        "dropped": "dropped and filled with another file before each phase",
        "locked": "filled with another file before each phase (this user may not drop it)",
    }
    lines = [
        f"Machine: {where['cpu']}, {where['cores']} cores, {where['memory_bytes'] / 2**30:.0f} GiB of memory, "
        f"{where['free_disk_bytes'] / 1e9:.0f} GB of disk free, load {where['load_average_before']:.1f} before the "
        f"start, niceness {where['niceness']} (cp and converters alike). Python {where['python']}, {packages}.",
        f"Command: `{result['command']}` ({result['seconds']:.0f} s)",
        f"Model: {model}, {result['parameters']:,} random bf16 parameters, {2 * result['parameters'] / 1e9:.2f} GB, "
        f"made in {result['synthesis_seconds']:.1f} s.{less} Page cache: {cache[result['page_cache']]}.",
        "",
        "| way | what | seconds | of cp, flushed | of cp alone | peak memory | with mapped | processor s | others |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way in ("hf_to_megatron", "megatron_to_hf"):
        phases = result[way]
        cp = phases["cp"]
        alone = cp["seconds"] - cp["flush_seconds"]
        lines.append(
            f"| {way} | cp -r, then flushed | {alone:.1f} + {cp['flush_seconds']:.1f} | | | | "
            f"| {cp['cpu_seconds']:.1f} | {cp['others']:.2f} |"
        )
        for name in ("not verified", "verified"):
            p = phases[name]
            what = "converter, --no-verify" if name == "not verified" else "converter, verified (its default)"
            lines.append(
                f"| {way} | {what} | {p['seconds']:.1f} | {p['seconds'] / cp['seconds']:.2f}x "
                f"| {p['seconds'] / alone:.2f}x | {p['anonymous'] / 2**30:.2f} GiB | {p['resident'] / 2**30:.2f} GiB "
                f"| {p['cpu_seconds']:.1f} | {p['others']:.2f} |"
            )
    same = "and config.json is the same" if result["same_config"] else "but config.json DIFFERS"
    lines.append(
        f"| both | there and back | all {result['identical_tensors']} tensors bit-identical, {same} | | | | | | |"
    )
    lines += [
        "",
        "Seconds are from the start of the command to its last byte on disk. Peak memory: anonymous and shared, every "
        f"{SAMPLE_SECONDS * 1000:.0f} ms; mapped files are page cache. Others: cores kept busy by everything else, the "
        "kernel's writers among it.",
    ]
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what every conversion's benchmark takes."""
    parser.add_argument("--work", type=Path, default=Path("/var/tmp"), metavar="DIR", help="directory on the disk to"
        " use, twice the model (default /var/tmp); all is made in a new folder there and removed")  # fmt: skip
    parser.add_argument("--shard-size", type=float, default=SHARD_BYTES / 1e9, metavar="GB", help="of the made files")
    parser.add_argument("--keep-caches", action="store_true", help="do not drop the machine's page cache")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON as well")


def run(
    arguments: argparse.Namespace, weights: Weights, files: Mapping[str, Mapping[str, Any]], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure in a new folder, which is removed; return all that is known, ``extra`` too."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    start = time.perf_counter()
    result: dict[str, Any] = {
        "machine": machine(arguments.work),
        "parameters": sum(torch.Size(shape).numel() for shape in weights.shapes.values()),
        "page_cache": "kept" if arguments.keep_caches else "dropped" if os.access(DROP_CACHES, os.W_OK) else "locked",
        **extra,
    }
    with tempfile.TemporaryDirectory(prefix="convert-", dir=arguments.work) as folder:
        shard_bytes = int(arguments.shard_size * 1e9)
        result |= measure(weights, files, Path(folder), shard_bytes=shard_bytes, keep_caches=arguments.keep_caches)
    result["seconds"] = time.perf_counter() - start
    script = Path(sys.argv[0])
    result["command"] = shlex.join(["python", str(Path(script.parent.name) / script.name), *sys.argv[1:]])
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def main() -> int:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description="The converters at full size against cp of the same bytes.")
    add_options(parser)
    parser.add_argument("--layers", type=int, default=None, help=f"of the language model (default {FULL.layers})")
    parser.add_argument("--vision-layers", type=int, default=None, help=f"of the tower (default {FULL.vision_layers})")
    parser.add_argument("--tiny", action="store_true", help="a model of a few MB: does the script run?")
    arguments = parser.parse_args()
    if not arguments.work.is_dir():
        parser.error(f"--work {arguments.work}: is no directory")
    base = TINY if arguments.tiny else FULL
    asked = dataclasses.replace(
        base, layers=arguments.layers or base.layers, vision_layers=arguments.vision_layers or base.vision_layers
    )
    sizes = fitting(asked, shutil.disk_usage(arguments.work).free)
    both = {"asked": dataclasses.asdict(asked), "sizes": dataclasses.asdict(sizes)}
    print(table(run(arguments, Weights(shapes(sizes)), {"config.json": config(sizes)}, both)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
