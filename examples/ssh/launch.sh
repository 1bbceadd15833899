#!/usr/bin/env bash
# Several nodes with nothing but ssh: start this on any machine that reaches them without a password.
#   HOSTS="node1 node2" RECIPE=codefuse_vl_14b/align OUTPUT_DIR=/shared/runs/align examples/ssh/launch.sh [key=value ...]
# It starts multinode_torchrun.sh on each, whose variables go along; repository, data and OUTPUT_DIR lie under the same path
# on all. SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 to it save and stop the run: exit code 75, and starting it again goes on. A run
# that crashes, or that a signal to a node stopped, is started again; wrong input (2) is not.
set -euo pipefail

: "${HOSTS:?names of the nodes, split at blanks; the first one is HEAD}"
: "${OUTPUT_DIR:?of the run, on storage that all nodes share}"
: "${MEGAVLM_HOME:=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}" # this repository, as all nodes see it
: "${MAX_STARTS:=3}"                             # crashes in a row without a new checkpoint before it gives up
: "${SSH:=ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=8}" # how to reach a node
: "${STOP_SECONDS:=600}"                         # what a node that was left behind has for its step and its save
readonly STOPPED=75 WRONG_INPUT=2 GAVE_UP=3 UNREACHABLE=255
# What goes along, where it is set.
readonly ALONG=(RECIPE OUTPUT_DIR OVERRIDES NPROC PORT RUN_ID MEGAVLM_HOME PYTHON IFNAME OMP_NUM_THREADS
  MAX_RESTARTS NCCL_DEBUG NCCL_IB_HCA NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME MEGAVLM_FAULT MEGAVLM_FAULT_ONCE
  WANDB_MODE WANDB_BASE_URL MLFLOW_TRACKING_URI SWANLAB_MODE) # no keys: ps shows a command line

OUTPUT_DIR=$(realpath -m "$OUTPUT_DIR")
LOG_DIR=$OUTPUT_DIR/logs/ssh
# shellcheck source=examples/starts.sh
source "$MEGAVLM_HOME/examples/starts.sh"
read -r -d '' -a hosts <<<"$HOSTS" || :
read -r -a reach <<<"$SSH"
mkdir -p "$LOG_DIR"

say() { printf '%(%F %T)T %s\n' -1 "$*"; }

# Starts this node's part, and notes its process for the signals.
start_on() {
  local number=$1 host=${hosts[$1]} name line
  shift
  line="mkdir -p $(printf %q "$LOG_DIR"); echo \$\$ >$(printf %q "$LOG_DIR/node-$number.pid"); exec env"
  for name in "${ALONG[@]}"; do
    if [[ -n ${!name+x} ]]; then line+=" $(printf %q "$name=${!name}")"; fi
  done
  line+=" HEAD=$(printf %q "${hosts[0]}") NNODES=${#hosts[@]}"
  line+=" bash $(printf %q "$MEGAVLM_HOME/examples/multinode_torchrun.sh")$( (($# == 0)) || printf ' %q' "$@")"
  "${reach[@]}" "$host" "bash -c $(printf %q "$line")" </dev/null
}

# Tells a node's part to save and stop, and waits for it: it may have lost us, and go on by itself.
stop_on() {
  local pid
  pid=$(printf %q "$LOG_DIR/node-$1.pid")
  "${reach[@]}" "${hosts[$1]}" "bash -c $(printf %q "pid=\$(cat $pid 2>/dev/null) || exit 0
    kill -0 \$pid 2>/dev/null && grep -qs multinode_torchrun /proc/\$pid/cmdline || exit 0
    kill -USR1 \$pid; [ $2 = wait ] || exit 0
    for ((n = 0; n < $STOP_SECONDS; n++)); do kill -0 \$pid 2>/dev/null || exit 0; sleep 1; done
    kill -KILL \$pid")" </dev/null
}

# One start on all nodes; returns 0 where all ended well, else what says most of the nodes' exit codes.
run_all() {
  local number code pid result=0 pids=()
  for number in "${!hosts[@]}"; do
    start_on "$number" "$@" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    while interrupted=0 code=0; do
      wait "$pid" || code=$?
      ((interrupted)) || break # a signal ends wait, not the ranks
    done
    # Wrong input says most, then a crash, then a stop; a node that cannot be reached is what others crash for.
    case $code in
      0) ;;
      "$WRONG_INPUT") result=$code ;;
      "$STOPPED") if ((result == 0)); then result=$code; fi ;;
      *) if ((result != WRONG_INPUT)); then result=$code; fi ;;
    esac
  done
  return "$result"
}

asked=0 interrupted=0
trap 'asked=1; interrupted=1; say "told to stop: the ranks finish their step and save"; stop_on 0 now || :' USR1 TERM INT
starts=0
while :; do
  starts=$((starts + 1))
  say "start $starts on ${hosts[*]}, newest checkpoint $(newest_checkpoint), logs in $OUTPUT_DIR/logs"
  code=0
  run_all "$@" || code=$?
  case $code in
    0)
      say "the run is complete: $OUTPUT_DIR"
      exit 0
      ;;
    "$WRONG_INPUT") exit "$code" ;;
    "$UNREACHABLE") say "a node could not be reached, or the connection to it was lost" ;;
  esac
  for number in "${!hosts[@]}"; do
    stop_on "$number" wait || say "${hosts[number]}: cannot be reached; if ranks still run there, the next start is refused"
  done
  if ((asked)); then
    say "the run stopped; start it again to go on from $(newest_checkpoint)"
    exit "$STOPPED"
  fi
  say "the run ended with exit code $code; newest checkpoint $(newest_checkpoint)"
  if [[ $code != "$STOPPED" ]] && ! MAX_RESTARTS=$MAX_STARTS may_try_again; then
    say "more than $MAX_STARTS starts in a row ended without a new checkpoint: giving up"
    exit "$GAVE_UP"
  fi
done
