#!/usr/bin/env bash
# Fine-tuning of a 14B model on 32 GPUs: sbatch examples/slurm/finetune_14b.sh [key=value ...], from the repository.
# Every variable below can be set in the environment, every #SBATCH line on sbatch's command line. docs/cluster.md.
#SBATCH --job-name=finetune-14b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Above: one task per GPU; ten minutes before the time limit the run saves and goes back into the queue.
set -euo pipefail

: "${RECIPE:=codefuse_vl_14b/sft}"               # a shipped recipe, or a YAML file
: "${OUTPUT_DIR:=runs/${RECIPE%.yaml}}"          # of the run; on storage that all nodes share
: "${LOAD:=}"                                    # checkpoint or run to start from; empty: what the recipe says
: "${OVERRIDES:=}"                               # key=value ..., split at blanks: data.train.0.path=/data/a
: "${MEGAVLM_HOME:=${SLURM_SUBMIT_DIR:-$PWD}}"   # this repository, as all nodes see it
: "${PYTHON:=}"                                  # empty: .venv of MEGAVLM_HOME, or python3 in a container
: "${CONTAINER:=none}"                           # none, pyxis (enroot) or apptainer
: "${IMAGE:=}"                                   # its image: a registry's name, a .sqsh or a .sif
: "${MOUNTS:=}"                                  # its mounts beside MEGAVLM_HOME: /data:/data,/ckpt:/ckpt
: "${IFNAME:=}"                                  # network interface for NCCL's and gloo's set-up; empty: they choose
: "${MAX_RESTARTS:=3}"                           # crashes in a row without a new checkpoint before the job fails
: "${REQUEUE:=1}"                                # 0: a run that was told to stop is not put back into the queue
: "${EXIT_WAIT:=120}"                            # seconds that ranks have once one has left, before they are killed
: "${SRUN_ARGS:=}"                               # more options of srun
: "${DRY_RUN:=0}"                                # 1: print the command instead

[[ -f $MEGAVLM_HOME/examples/slurm/job.sh ]] || {
  echo "error: MEGAVLM_HOME: $MEGAVLM_HOME is not the repository; submit from its root, or set MEGAVLM_HOME" >&2
  exit 2
}
# shellcheck source=examples/slurm/job.sh
source "$MEGAVLM_HOME/examples/slurm/job.sh"
train "$@"
