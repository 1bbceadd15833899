"""Rows of systems whose weights were never published: no family is registered, as there is nothing to convert."""

from __future__ import annotations

from functools import partial

from whole import ALL, Lack, Published, Stage, WholeFamily, part

_CODE = "no weights were published: nothing is converted"
HEADS = "is not divisible by parallel.tensor_model_parallel_size"
_PRETRAIN = partial(
    Stage, ALL, steps=200_000, batch=512, length=4096, tokens=144, warmup=2000, decay=0.1, adam=(0.9, 0.95, 1e-8, 1)
)
_SFT = partial(Stage, ALL, 1e-5, 10_000, 256, 2048, 720, warmup=300, adam=(0.9, 0.95, 1e-8, 1))

_PALI3 = partial(Stage, lr=1e-5, steps=10_000, batch=32, warmup=500, decay=0.03)

PARTS = {
    "mm1": ("towers.vit", "connectors.c_abstractor", "decoders.decoder"),
    "pali3": ("towers.vit", "connectors.mlp", "decoders.encoder_decoder"),
}
"""As ``family_choice.PARTS``."""
TRAINED_ONLY: dict[str, WholeFamily] = {
    "mm1": part(
        Lack(_CODE),
        f"{_CODE}; parts against references in tests/architectures, steps at two layouts in test_mm1.py",
        presets={
            "mm1_3b": Published(4_088_900_288),
            "mm1_7b": Published(7_408_298_816),
            "mm1_3b_moe": Published(72_022_698_688),
            "mm1_7b_moe": Published(40_955_390_784),
            "mm1_30b": Published(33_228_978_496, refused={8: f"52 {HEADS} (8)"}),
        },
        recipes={
            f"mm1_{size}/{stage}": found
            for size, lr, least in (
                ("3b", 5.8e-5, 5.8e-6), ("7b", 4.1e-5, 4.1e-6), ("30b", 2.2e-5, 2.2e-6), ("3b_moe", 5.8e-5, 5.8e-6),
                ("7b_moe", 4.1e-5, 4.1e-6),
            )
            for stage, found in (
                ("pretrain", _PRETRAIN(lr=lr, least=least)), ("sft", _SFT(f"mm1_{size}/pretrain"))
            )
        },
    ),
    "pali3": part(
        Lack(_CODE),
        f"{_CODE}; its language model against Transformers' T5 in test_t5.py, steps at two layouts in test_pali3.py",
        presets={"pali3_5b": Published(4_695_939_456)},
        recipes={
            "pali3_5b/stage1": _PALI3(ALL[1:], length=384, tokens=256),
            "pali3_5b/stage2_812": _PALI3(ALL, length=3584, tokens=3364, after="pali3_5b/stage1"),
            "pali3_5b/stage2_1064": _PALI3(ALL, length=6016, tokens=5776, after="pali3_5b/stage2_812"),
        },
    ),
}  # fmt: skip
