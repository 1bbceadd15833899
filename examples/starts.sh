# shellcheck shell=bash
# What job scripts share: when a run that crashed may be started again. Sourced; asks OUTPUT_DIR, LOG_DIR, MAX_RESTARTS.

newest_checkpoint() { cat "$OUTPUT_DIR/checkpoints/latest" 2>/dev/null || echo none; }

# Counts starts that ended without a new checkpoint, over requeues too; false where there were more than MAX_RESTARTS.
may_try_again() {
  local newest before=- count=0
  newest=$(newest_checkpoint)
  if [[ -f $LOG_DIR/tries ]]; then read -r before count <"$LOG_DIR/tries"; fi
  if [[ $newest == "$before" ]]; then count=$((count + 1)); else count=1; fi
  echo "$newest $count" >"$LOG_DIR/tries"
  ((count <= MAX_RESTARTS))
}
