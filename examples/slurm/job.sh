# shellcheck shell=bash
# What the job scripts beside this file share: they set the variables, this starts the ranks and brings the run through
# signals, preemption, time limits and crashes. Sourced, not submitted.
#
# One Slurm task per GPU, not one torchrun per node: then a rank's exit code and the signals that it gets are Slurm's own.
# megavlm leaves with 75 where it was asked to stop and can go on; torchrun would take that for a failure and start it
# again, and waits only 30 s for ranks that it was told to end, too little for a checkpoint of 14B. Slurm also gives one
# log per rank, and counts, binds and cleans up the processes. (Without Slurm: ../multinode_torchrun.sh.)

readonly STOPPED=75 WRONG_INPUT=2

say() { printf '%(%F %T)T %s\n' -1 "$*"; }

die() {
  echo "error: $*" >&2
  exit "$WRONG_INPUT"
}

# Sets LAUNCH: the words in front of a command that run it on the nodes, in the container if there is one.
# Arguments: options of srun; SRUN_ARGS come after them.
set_launch() {
  local extra=()
  read -r -a extra <<<"${SRUN_ARGS:-}" || :
  LAUNCH=(srun "$@" "${extra[@]}")
  case ${CONTAINER:=none} in
    none)
      : "${PYTHON:=$MEGAVLM_HOME/.venv/bin/python}"
      [[ -x $PYTHON ]] || die "PYTHON: $PYTHON is not there; run make setup in MEGAVLM_HOME, or set PYTHON or CONTAINER"
      ;;
    pyxis) LAUNCH+=("--container-image=$IMAGE" "--container-workdir=$MEGAVLM_HOME" --no-container-mount-home) ;;
    apptainer) LAUNCH+=(apptainer exec --nv --pwd "$MEGAVLM_HOME") ;;
    *) die "CONTAINER: $CONTAINER is none of none, pyxis, apptainer" ;;
  esac
  [[ $CONTAINER == none ]] && return
  : "${PYTHON:=python3}"
  [[ -n $IMAGE ]] || die "IMAGE: set it to the image that CONTAINER=$CONTAINER starts"
  local mounts="$MEGAVLM_HOME:$MEGAVLM_HOME${MOUNTS:+,$MOUNTS}"
  case $CONTAINER in
    pyxis) LAUNCH+=("--container-mounts=$mounts") ;;
    apptainer) LAUNCH+=(--bind "$mounts" "$IMAGE") ;;
  esac
}

# Environment of every rank. What is set already stays.
set_environment() {
  # What the CPU has to do is decode, which has threads of its own.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
  # Keeps tensor-parallel kernels behind the communication that they overlap with.
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
  export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
  # A collective that hangs ends its rank.
  export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
  # Packs hold different numbers of images: fewer holes in the GPU's memory.
  export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
  export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
  if [[ -n ${IFNAME:-} ]]; then
    export NCCL_SOCKET_IFNAME="$IFNAME" GLOO_SOCKET_IFNAME="$IFNAME"
  fi
  if [[ ${CONTAINER:-none} == none ]]; then
    export PYTHONPATH="$MEGAVLM_HOME${PYTHONPATH:+:$PYTHONPATH}"
  fi
}

# Where the ranks meet: the first node, and a port that other jobs, and this one's last start, do not use.
set_rendezvous() {
  local first
  if [[ -z ${MASTER_ADDR:-} ]]; then
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=$(scontrol show node --oneliner "$first" | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)
  fi
  MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + starts++) % 12000))
  export MASTER_ADDR MASTER_PORT
}

# shellcheck source=examples/starts.sh
source "$MEGAVLM_HOME/examples/starts.sh"

# Puts the job back into the queue. It keeps its id, script, environment and logs.
requeue() {
  local state
  # Only a running job: one that was cancelled would come back to life, and one that Slurm preempts comes back anyway.
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null) || state=gone
  if [[ $state != RUNNING ]]; then
    say "the run stopped; the job is $state, so Slurm decides whether it comes back"
    exit "$STOPPED"
  fi
  if [[ $REQUEUE == 1 ]]; then
    # Said first: Slurm may kill this shell before scontrol returns.
    say "the run stopped; the job goes back into the queue, and on from $(newest_checkpoint)"
    if scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi
  fi
  say "the run stopped and was not requeued (REQUEUE=$REQUEUE); submit it again to go on from $(newest_checkpoint)"
  exit "$STOPPED"
}

# Runs the ranks once, in the background so that this shell can take signals; returns the largest exit code of a rank.
run_ranks() {
  local code pid interrupted
  set_rendezvous
  say "start $starts: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, newest checkpoint $(newest_checkpoint)," \
    "logs in $LOG_DIR/rank-*.log"
  "${command[@]}" &
  pid=$!
  # Slurm's --signal=B:USR1 reaches this shell alone; srun hands it on to all ranks.
  trap 'asked=1; interrupted=1; say "told to stop: the ranks finish their step and save"
    kill -USR1 "$pid" 2>/dev/null || :' USR1 TERM
  while :; do
    interrupted=0 code=0
    wait "$pid" || code=$?
    ((interrupted)) || break # a signal ends wait, not the ranks
  done
  trap 'asked=1' USR1 TERM
  return "$code"
}

# Trains until the run is complete, or hands the job back to Slurm. The script's own arguments are overrides too.
train() {
  local code asked=0 starts=0 words=() command=()
  cd "$MEGAVLM_HOME" || die "MEGAVLM_HOME: $MEGAVLM_HOME is not a directory"
  OUTPUT_DIR=$(realpath -m "$OUTPUT_DIR")
  LOG_DIR="$OUTPUT_DIR/logs/job-${SLURM_JOB_ID:-none}"
  read -r -d '' -a words <<<"${OVERRIDES:-}" || :
  [[ -z ${LOAD:-} ]] || words=("checkpoint.load=$LOAD" "${words[@]}")
  # --kill-on-bad-exit=0 --wait: ranks that lost another one have EXIT_WAIT seconds to say so, and to end by themselves.
  # --gpu-bind=none: a rank finds its GPU by LOCAL_RANK among all of its node, which peer-to-peer copies need.
  # --cpus-per-task: since Slurm 22.05 srun does not take it from sbatch.
  set_launch "--ntasks=${SLURM_NTASKS:-1}" "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" --gpu-bind=none \
    --kill-on-bad-exit=0 "--wait=$EXIT_WAIT" --open-mode=append "--output=$LOG_DIR/rank-%4t.log"
  set_environment
  # shellcheck disable=SC2016 # each task expands its own variables
  command=("${LAUNCH[@]}" bash -c
    'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' rank
    "$PYTHON" -m megavlm train "$RECIPE" "output_dir=$OUTPUT_DIR" "${words[@]}" "$@")
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
    return
  fi
  [[ -n ${SLURM_JOB_ID:-} ]] || die "this is a job script: submit it with sbatch, or see its command with DRY_RUN=1"
  mkdir -p "$LOG_DIR"
  trap 'asked=1' USR1 TERM
  while :; do
    if ((asked)); then requeue; fi # told so while no ranks were running
    code=0
    run_ranks || code=$?
    case $code in
      0)
        say "the run is complete: $OUTPUT_DIR"
        exit 0
        ;;
      "$WRONG_INPUT")
        grep -h 'megavlm: error:' "$LOG_DIR"/rank-*.log | tail -n 1 >&2 || :
        exit "$code"
        ;;
      "$STOPPED") requeue ;;
    esac
    # 138 and 143: SIGUSR1 or SIGTERM met a rank that was still starting.
    say "the ranks ended with exit code $code; the end of rank 0's log:"
    tail -n 5 "$LOG_DIR/rank-0000.log"
    if ! may_try_again; then
      say "more than $MAX_RESTARTS starts in a row ended without a new checkpoint: giving up"
      exit "$code"
    fi
    if ((asked)) || [[ $code == 138 || $code == 143 ]]; then requeue; fi
  done
}

# Converts weights by one task; the variables are those of convert.sh.
convert() {
  local words=() command=()
  cd "$MEGAVLM_HOME" || die "MEGAVLM_HOME: $MEGAVLM_HOME is not a directory"
  [[ -n $OUT ]] || die "OUT: set it to the directory to write"
  case $DIRECTION in
    in) words=(hf-to-megatron ${HF:+--hf "$HF"}) ;;
    out)
      [[ -n $MEGATRON ]] || die "MEGATRON: set it to a checkpoint, or to a run's output_dir"
      words=(megatron-to-hf --megatron "$MEGATRON")
      ;;
    *) die "DIRECTION: $DIRECTION is none of in, out" ;;
  esac
  set_launch --ntasks=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}"
  set_environment
  command=("${LAUNCH[@]}" "$PYTHON" -m megavlm convert "${words[@]}" --out "$OUT" "$@")
  if [[ $DRY_RUN == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
    return
  fi
  [[ -n ${SLURM_JOB_ID:-} ]] || die "this is a job script: submit it with sbatch, or see its command with DRY_RUN=1"
  # Requeued after it was done: nothing is left to do.
  if [[ ${SLURM_RESTART_COUNT:-0} != 0 && -e $OUT ]]; then
    say "$OUT is there"
    return
  fi
  "${command[@]}"
}
