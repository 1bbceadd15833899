"""The keys of a run's logs: the branch ``logging``."""

from __future__ import annotations

from pydantic import Field

from megavlm.config.fields import config_class


@config_class
class LoggingConfig:
    """What is shown while training."""

    log_interval: int = Field(default=10, gt=0)
    """Steps between progress lines and TensorBoard points."""
    tensorboard: bool = True
    """Write TensorBoard files to output_dir/tensorboard."""
    wandb: str | None = Field(default=None, min_length=1)
    """Also log to Weights & Biases: the project, or entity/project; null for none. Needs the extra wandb. Login, server
    and mode are the package's own (wandb login, WANDB_BASE_URL, WANDB_MODE=offline): docs/curves.md."""
    mlflow: str | None = Field(default=None, min_length=1)
    """Also log to MLflow: the experiment; null for none. Needs the extra mlflow. The server is MLFLOW_TRACKING_URI;
    without it, files in output_dir/loggers/mlflow."""
    swanlab: str | None = Field(default=None, min_length=1)
    """Also log to SwanLab: the project, or workspace/project; null for none. Needs the extra swanlab. Login, server and
    mode are the package's own (swanlab login, SWANLAB_MODE=offline)."""
    panel_interval: int | None = Field(default=None, gt=0)
    """Steps between panels of held-out images with the model's answers; null for none. Needs data.validation."""
    panel_samples: int = Field(default=6, gt=0)
    """Samples on a panel."""
    panel_max_new_tokens: int = Field(default=24, gt=0)
    """Longest answer on a panel."""
    timing_interval: int | None = Field(default=10, gt=0)
    """Steps between steps whose parts are timed on all ranks: stages, pipeline bubble, communication, the slowest rank;
    null for none. They are shown with the next progress line. Steps that are recorded (profile_steps,
    memory_snapshot_steps) are not timed."""
    profile_steps: tuple[int, int] | None = None
    """First and last step to record with PyTorch's profiler, to output_dir/profile (for chrome://tracing,
    ui.perfetto.dev or TensorBoard); null for none. Recorded steps are slower."""
    profile_ranks: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Ranks that write profiles and memory snapshots."""
    memory_snapshot_steps: tuple[int, int] | None = None
    """First and last step of which every allocation of device memory is recorded, to output_dir/profile (for
    pytorch.org/memory_viz); null for none. CUDA only."""
