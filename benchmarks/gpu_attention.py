"""One job of ``gpu_check``: core attention on the device, packed and not, against fp32 arithmetic on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Name, causal, segment lengths of a pack (None: not packed), key/value heads (negative: CROSS_KEYS keys, not packed).
CASES: tuple[tuple[str, bool, tuple[int, ...] | None, int], ...] = (
    ("causal", True, None, 8),
    ("causal, grouped keys", True, None, 2),
    ("full", False, None, 8),
    ("cross", False, None, -8),
    ("packed causal", True, (64, 1, 100, 91), 8),
    ("packed causal, grouped keys", True, (128, 128), 2),
    ("packed prefix", True, (64, 1, 100, 91), 2),
)
SPANS = ((0, 20), (65, 95), (180, 200))
"""Of the case with a prefix: positions that see each other both ways, two in front of a segment and one inside."""
POSITIONS, HEADS = 256, 8
WIDTHS = (64, 80, 104, 128, 192)
"""Of heads: CLIP's and the quickstart's, Qwen2.5-VL's tower's, Qwen-VL's tower's, language models', MLA's."""
CROSS_KEYS = 325
"""Keys of the case in which queries look at another sequence, as a resampler's do."""


def attention(job: dict[str, Any]) -> dict[str, Any]:
    """Return the largest difference of outputs and of gradients for each case, relative to the largest value."""
    from megavlm.parallel.device import has_cuda, prepare_device

    prepare_device()
    import torch

    from megavlm.config.schema import ParallelConfig
    from megavlm.parallel.state import process_groups

    found = {}
    with process_groups(ParallelConfig(), 1):
        for width in WIDTHS:
            # The first width in every case, the others in those that differ by kernel.
            for number, (name, causal, lengths, groups) in enumerate(CASES if width == WIDTHS[0] else CASES[2:]):
                label = name if width == WIDTHS[0] else f"{name}, width {width}"
                try:
                    found[label] = _compare(
                        job["impl"], width, causal, lengths, groups, seed=number, two_way=name == "packed prefix"
                    )
                except Exception as error:  # one case must not hide the others
                    found[label] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    return {"device": "cuda" if has_cuda() else "cpu", "cases": found, "dtype": str(torch.bfloat16)}


def _compare(
    impl: str, width: int, causal: bool, lengths: tuple[int, ...] | None, groups: int, seed: int, *, two_way: bool
) -> dict[str, Any]:
    import torch
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megavlm.layers.specs import LayerKind, layer_modules
    from megavlm.parallel.device import local_device

    cross, groups = groups < 0, abs(groups)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * width,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        kv_channels=width,
        attention_dropout=0.0,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    if lengths is not None and causal:
        mask = AttnMaskType.padding_causal
    spans = SPANS if two_way else ()
    kind = LayerKind("two_way" if two_way else "causal" if causal else "full")
    core = build_module(
        layer_modules(kind, transformer_engine=impl == "transformer_engine").core_attention,
        config=config,
        layer_number=1,
        attn_mask_type=mask,
        attention_type="cross" if cross else "self",
    )
    torch.manual_seed(seed)
    shape = (POSITIONS,) if lengths is not None else (POSITIONS, 2)
    keys = (CROSS_KEYS, 2) if cross else shape
    q, k, v = (
        torch.randn(*positions, heads, width).bfloat16()
        for positions, heads in ((shape, HEADS), (keys, groups), (keys, groups))
    )
    weight = torch.randn(*shape, HEADS * width)
    ours = [x.clone().to(local_device()).requires_grad_() for x in (q, k, v)]
    output = core(*ours, None, attn_mask_type=mask, packed_seq_params=_packed(lengths, spans))
    output = output.reshape(weight.shape)
    output.float().mul(weight.to(output.device)).sum().backward()
    plain = [x.float().requires_grad_() for x in (q, k, v)]
    expected = _exact(*plain, causal, lengths, spans)
    expected.mul(weight).sum().backward()
    pairs = [(one.grad, other.grad) for one, other in zip(ours, plain, strict=True)]
    return {
        "output": _apart(output, expected),
        "gradient": max(_apart(one, other) for one, other in pairs),
    }


def _packed(lengths: tuple[int, ...] | None, spans: tuple[tuple[int, int], ...]) -> Any:
    if lengths is None:
        return None
    import numpy as np

    from megavlm.layers.segments import packed_segments
    from megavlm.parallel.device import local_device

    return packed_segments(np.cumsum([0, *lengths]), local_device(), spans=spans or None)


def _exact(
    q: Any, k: Any, v: Any, causal: bool, lengths: tuple[int, ...] | None, spans: tuple[tuple[int, int], ...]
) -> Any:
    """Softmax of the scores, written out: every segment of a pack alone, every sample of a batch alone."""
    import torch

    if lengths is None:
        parts = [_one(q[:, b], k[:, b], v[:, b], causal) for b in range(q.size(1))]
        return torch.stack(parts, dim=1)
    parts, begin = [], 0
    for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        parts.append(_one(*part, causal, [(a - begin, b - begin) for a, b in spans]))
        begin += len(part[0])
    return torch.cat(parts)


def _one(q: Any, k: Any, v: Any, causal: bool, spans: Sequence[tuple[int, int]] = ()) -> Any:
    """[S, N, D] and [S, G, D] to [S, N * D]; positions of a span see all of it, those outside of S are of others."""
    import torch

    repeat = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.einsum("snd,tnd->nst", q, k) / q.size(-1) ** 0.5
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        for a, b in spans:
            if a >= 0 and b <= len(hidden):
                hidden[a:b, a:b] = False
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("nst,tnd->snd", scores.softmax(-1), v).flatten(1)


def _apart(ours: Any, expected: Any) -> float:
    difference = (ours.detach().float().cpu() - expected.detach().float()).abs().max()
    return float(difference / expected.detach().abs().max())
