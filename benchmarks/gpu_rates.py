"""One job of ``gpu_check``: what the device does with products, attention and copies of the sizes that a trainer has.

``megavlm plan --measured`` takes these in place of its own table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

# Rows, columns and depth of products: of a pack of 2048 tokens and of 5 pictures in a 14B's layers and tower.
MATMULS = (
    (8192, 8192, 8192),
    (2048, 15360, 5120),
    (2048, 27392, 5120),
    (2048, 5120, 13696),
    (2048, 32768, 5120),
    (5125, 4992, 1664),
    (5125, 8192, 1664),
    (5125, 1664, 8192),
    (2048, 4096, 4096),
    (512, 4096, 4096),
)
# Positions of a pack, in segments of so many; heads; width of a head; causal.
ATTENTIONS = (
    (2048, 512, 40, 128, True),
    (8192, 8192, 32, 128, True),
    (5125, 1025, 16, 104, False),
    (8192, 1024, 16, 64, False),
    (8192, 2048, 16, 80, True),
)
COPIES = (2**20, 2**24, 2**28, 2**30)


def rates(job: dict[str, Any]) -> dict[str, Any]:
    """Return TFLOP/s of products and attention (forward and backward), and GB/s of copies, host ones too."""
    from megavlm.parallel.device import has_cuda, local_device, prepare_device, synchronize

    prepare_device()
    import torch

    small = job.get("small", False)
    dtype, device = torch.bfloat16, local_device()

    def seconds(call: Callable[[], Any], rounds: int = 7) -> float:
        call()
        if small:
            rounds = 1
        found = []
        for _ in range(rounds):
            synchronize()
            start = time.perf_counter()
            for _ in range(4):
                call()
            synchronize()
            found.append((time.perf_counter() - start) / 4)
        return statistics.median(found)

    matmul = []
    for m, n, k in ((64, 64, 64),) if small else MATMULS:
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(n, k, device=device).to(dtype).t()
        matmul.append([m, n, k, 2 * m * n * k / seconds(lambda a=a, b=b: a @ b) / 1e12])
    attention = [
        [*case, _attention(torch, seconds, device, dtype, *case)]
        for case in (((64, 32, 2, 64, True),) if small else ATTENTIONS)
    ]
    copy, host = [], []
    for size in (2**16,) if small else COPIES:
        x = torch.empty(size, dtype=torch.uint8, device=device)
        y = torch.empty_like(x)
        copy.append([size, 2 * size / seconds(lambda x=x, y=y: y.copy_(x)) / 1e9])
        if size >= 2**28 and has_cuda():
            pageable, pinned = (
                torch.empty(size, dtype=torch.uint8),
                torch.empty(size, dtype=torch.uint8, pin_memory=True),
            )
            pageable.fill_(1)
            host.append(
                [size]
                + [size / seconds(lambda x=x, t=t: t.copy_(x), 3) / 1e9 for t in (pageable, pinned)]
                + [size / seconds(lambda x=x, t=t: x.copy_(t), 3) / 1e9 for t in (pageable, pinned)]
            )
    wgrad = _wgrad(torch, seconds, device) if has_cuda() else None
    return {"matmul": matmul, "attention": attention, "copy": copy, "host": host, "wgrad": wgrad}


def _attention(
    torch: Any, seconds: Any, device: Any, dtype: Any, tokens: int, length: int, heads: int, width: int, causal: bool
) -> float:
    """TFLOP/s of forward and backward, masked halves not counted; whole segments, the last one shorter."""
    import numpy as np
    from megatron.core.transformer.enums import AttnMaskType

    from megavlm.layers.attention import TorchAttention
    from megavlm.layers.segments import packed_segments

    borders = np.array([*range(0, tokens, length), tokens], np.int32)
    q, k, v = (torch.randn(tokens, heads, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    packed = packed_segments(borders, device)
    attend = TorchAttention._packed
    core: Any = TorchAttention.__new__(TorchAttention)
    torch.nn.Module.__init__(core)
    core.dropout, core.softmax_scale, core.training, core.attn_mask_type = 0.0, None, True, AttnMaskType.causal
    core.sliding_window = None
    grad = torch.randn_like(q)

    def step() -> None:
        torch.autograd.grad(attend(core, q, k, v, causal, packed), (q, k, v), grad)

    squares = float((np.diff(borders).astype(np.float64) ** 2).sum())
    operations = 3.5 * 4 * squares * heads * width * (0.5 if causal else 1.0)
    return operations / seconds(step) / 1e12


def _wgrad(torch: Any, seconds: Any, device: Any) -> dict[str, float]:
    """Milliseconds of a weight gradient: written in bf16 and added, against added in the product."""
    from megavlm.parallel import wgrad

    x = torch.randn(2048, 5120, device=device, dtype=torch.bfloat16)
    dy = torch.randn(2048, 27392, device=device, dtype=torch.bfloat16)
    main = torch.zeros(27392, 5120, device=device)

    def written() -> None:
        main.add_(dy.t() @ x)

    result = {"written_and_added_ms": 1e3 * seconds(written)}
    if wgrad.works():
        exact = dy.float().t() @ x.float()
        main.zero_()
        wgrad.accumulate_fp32(x, dy, main)
        result["difference"] = float((main - exact).abs().max() / exact.abs().max())
        result["in_product_ms"] = 1e3 * seconds(lambda: wgrad.accumulate_fp32(x, dy, main))
    return result
