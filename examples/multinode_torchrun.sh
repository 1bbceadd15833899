#!/usr/bin/env bash
# Several nodes without Slurm: start this line on each of them (examples/kubernetes, skypilot and ssh do).
#   HEAD=node1 NNODES=4 RECIPE=codefuse_vl_14b/align examples/multinode_torchrun.sh [key=value ...]
# torchrun brings a crashed run back, MAX_RESTARTS times. SIGTERM or SIGUSR1 to this script, on one node, save and stop
# the run on all; it then exits with 75, and starting it again goes on. Exit codes are those of megavlm train.
set -euo pipefail

: "${RECIPE:=codefuse_vl_14b/align}"             # a shipped recipe, or a YAML file
: "${OUTPUT_DIR:=runs/${RECIPE%.yaml}}"          # of the run; on storage that all nodes share
: "${OVERRIDES:=}"                               # key=value ..., split at blanks
: "${NNODES:=1}"                                 # nodes
: "${NPROC:=8}"                                  # ranks of each node: its GPUs
: "${HEAD:=localhost}"                           # the first node's name, as all nodes reach it
: "${PORT:=29400}"                               # a free port there
: "${RUN_ID:=megavlm}"                           # the same on all nodes of a run, another for each run on HEAD:PORT
: "${MEGAVLM_HOME:=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}" # this repository
: "${PYTHON:=$MEGAVLM_HOME/.venv/bin/python}"    # with torch and what megavlm needs
: "${IFNAME:=}"                                  # network interface for NCCL's and gloo's set-up; empty: they choose
: "${MAX_RESTARTS:=3}"                           # restarts after crashes

[[ -x $PYTHON ]] || {
  echo "error: PYTHON: $PYTHON is not there; run make setup in $MEGAVLM_HOME, or set PYTHON" >&2
  exit 2
}
OUTPUT_DIR=$(realpath -m "$OUTPUT_DIR")
LOG_DIR=$OUTPUT_DIR/logs/$RUN_ID
VERDICT=$(mktemp -u)
export PYTHON LOG_DIR VERDICT PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export PYTHONPATH="$MEGAVLM_HOME${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
if [[ -n $IFNAME ]]; then export NCCL_SOCKET_IFNAME="$IFNAME" GLOO_SOCKET_IFNAME="$IFNAME"; fi
mkdir -p "$LOG_DIR"
read -r -d '' -a words <<<"$OVERRIDES" || :

# One rank. To torchrun every exit code but 0 is a crash, to be started again; 75 (stopped, can go on) and 2 (wrong
# input) are not, so they are noted beside it and torchrun sees a 0. A signal goes on to Python, and the wait goes on.
# shellcheck disable=SC2016
RANK_COMMAND='
rm -f "$VERDICT" # of a start that crashed
exec >>"$LOG_DIR/$(printf "rank-%04d.log" "$RANK")" 2>&1
"$PYTHON" -m megavlm train "$@" &
child=$!
trap "signalled=1; kill -USR1 $child 2>/dev/null" USR1 TERM
while signalled=0 code=0; do
  wait "$child" || code=$?
  [ "$signalled" = 1 ] || break
done
case $code in
  75 | 2) echo "$code" >"$VERDICT"; exit 0 ;;
esac
exit "$code"'

"$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$RUN_ID" --no-python \
  bash -c "$RANK_COMMAND" rank "$RECIPE" "output_dir=$OUTPUT_DIR" "${words[@]}" "$@" &
torchrun=$!
# To the ranks, not to torchrun: that would give them 30 s, and a crash to see. Until it has ranks, again each second.
# shellcheck disable=SC2329 # the trap calls it
tell_ranks() {
  until pkill -USR1 -P "$torchrun"; do
    kill -0 "$torchrun" 2>/dev/null || return 0
    sleep 1
  done
}
trap 'signalled=1; tell_ranks' USR1 TERM
while signalled=0 code=0; do
  wait "$torchrun" || code=$?
  ((signalled)) || break
done
if [[ -f $VERDICT ]]; then
  code=$(<"$VERDICT")
  rm "$VERDICT"
fi
if [[ $code == 2 ]]; then grep -h 'megavlm: error:' "$LOG_DIR"/rank-*.log | tail -n 1 >&2 || :; fi
exit "$code"
