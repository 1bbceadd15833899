#!/usr/bin/env bash
# One node of a run under a scheduler that starts a command on each node and again where it fails (Kubernetes, SkyPilot):
#   HEAD=node-0 NNODES=4 NODE_RANK=0 RECIPE=... OUTPUT_DIR=... examples/node.sh [key=value ...]
# It starts multinode_torchrun.sh, whose variables are its own too, and gives what happened an exit code:
#   0   the run is complete
#   2   wrong input: starting it again would end the same
#   3   more than MAX_STARTS starts in a row ended without a new checkpoint: giving up
#   AGAIN (75)  it was told to stop, on this node or another one, or it crashed: start it again, on all nodes
# SIGTERM or SIGUSR1 saves and stops; the scheduler must give it time for a step and a save.
set -euo pipefail

: "${HEAD:?the name of the first node, as all nodes reach it}"
: "${OUTPUT_DIR:?of the run, on storage that all nodes share}"
: "${NODE_RANK:=0}"                              # of this node; the first one counts the starts
: "${AGAIN:=75}"                                 # exit code that makes the scheduler start it again
: "${MAX_STARTS:=3}"                             # crashes in a row without a new checkpoint before it gives up
: "${DNS_SECONDS:=600}"                          # how long the first node's name may be unknown
: "${RUN_ID:=megavlm}"                           # the same on all nodes
: "${MEGAVLM_HOME:=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}" # this repository
: "${PYTHON:=$(command -v python3)}"             # with torch and what megavlm needs
readonly STOPPED=75 WRONG_INPUT=2 GAVE_UP=3

OUTPUT_DIR=$(realpath -m "$OUTPUT_DIR")
LOG_DIR=$OUTPUT_DIR/logs/$RUN_ID
# shellcheck source=examples/starts.sh
source "$MEGAVLM_HOME/examples/starts.sh"
# What operators set for a torchrun of their own would be taken for ours: ranks, and torchrun's options.
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT "${!PET_@}"
export HEAD OUTPUT_DIR RUN_ID MEGAVLM_HOME PYTHON

child='' asked=0 interrupted=0
trap 'asked=1; interrupted=1; echo "told to stop: the ranks finish their step and save"
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || :' USR1 TERM
# A name of a pod is known once the pod has an address.
for ((second = 0; second < DNS_SECONDS; second++)); do
  if ((asked)); then exit "$AGAIN"; fi
  if getent hosts "$HEAD" >/dev/null; then break; fi
  sleep 1
done

"$MEGAVLM_HOME/examples/multinode_torchrun.sh" "$@" &
child=$!
while interrupted=0 code=0; do
  wait "$child" || code=$?
  ((interrupted)) || break # a signal ends wait, not the ranks
done
case $code in
  0 | "$WRONG_INPUT") exit "$code" ;;
  "$STOPPED")
    echo "the run stopped, and goes on from $(newest_checkpoint) when it is started again"
    exit "$AGAIN"
    ;;
esac
echo "the ranks ended with exit code $code; logs in $LOG_DIR, newest checkpoint $(newest_checkpoint)"
if ((!asked)) && [[ $NODE_RANK == 0 ]]; then
  MAX_RESTARTS=$MAX_STARTS may_try_again || {
    echo "more than $MAX_STARTS starts in a row ended without a new checkpoint: giving up"
    exit "$GAVE_UP"
  }
fi
exit "$AGAIN"
