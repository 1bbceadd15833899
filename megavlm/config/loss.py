"""Keys of what is minimised."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megavlm.config.fields import config_class


@config_class
class LossConfig:
    """What is minimised."""

    kind: Literal["token_mean", "task_mean"] = "token_mean"
    """token_mean: the mean over all supervised tokens of the step; task_mean: the mean over each task's supervised
    tokens, and of these the mean by loss_weight over the tasks in the step (multi-task fine-tuning)."""
    image_tokens: float = Field(default=0.0, ge=0, le=100)
    """What the loss of predicting a picture's token is multiplied by, in models whose pictures are tokens (Chameleon).
    0 predicts none, and takes these tokens out of the softmax. Data must have codes (megavlm prepare --image-codes)."""
    z_loss: float = Field(default=0.0, ge=0, le=1)
    """Weight of log^2 Z, which is added to the loss of each supervised token in training; Z is the sum of the
    exponentials of its logits. It keeps logits from drifting. The training loss that is reported has it, the validation
    loss has not."""
