#!/usr/bin/env bash
# Weights in or out, on one node without GPUs: sbatch examples/slurm/convert.sh, from the repository's root.
#   HF=/models/Qwen-VL OUT=/ckpt/qwen_vl sbatch examples/slurm/convert.sh
#   DIRECTION=out MEGATRON=runs/finetune_14b OUT=/models/mine sbatch examples/slurm/convert.sh
# Arguments are further options of megavlm convert (docs/conversion.md). Interrupted, it begins anew when it is
# requeued: the output gets its name when it is whole.
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

: "${DIRECTION:=in}"                             # in: Hugging Face to Megatron; out: Megatron to Hugging Face
: "${HF:=}"                                      # in: directory with the weights; empty: parts, in the arguments
: "${MEGATRON:=}"                                # out: checkpoint, or a run's output_dir
: "${OUT:=}"                                     # what to write; must not be there yet
: "${MEGAVLM_HOME:=${SLURM_SUBMIT_DIR:-$PWD}}"   # this repository, as all nodes see it
: "${PYTHON:=}"                                  # empty: .venv of MEGAVLM_HOME, or python3 in a container
: "${CONTAINER:=none}"                           # none, pyxis (enroot) or apptainer
: "${IMAGE:=}"                                   # its image
: "${MOUNTS:=}"                                  # its mounts beside MEGAVLM_HOME: /models:/models,/ckpt:/ckpt
: "${SRUN_ARGS:=}"                               # more options of srun
: "${DRY_RUN:=0}"                                # 1: print the command instead

[[ -f $MEGAVLM_HOME/examples/slurm/job.sh ]] || {
  echo "error: MEGAVLM_HOME: $MEGAVLM_HOME is not the repository; submit from its root, or set MEGAVLM_HOME" >&2
  exit 2
}
# shellcheck source=examples/slurm/job.sh
source "$MEGAVLM_HOME/examples/slurm/job.sh"
convert "$@"
