#!/usr/bin/env bash
# Installs Debian's Slurm and munge, for make test-slurm, where they are missing. Their services are not started.
set -euo pipefail

have() {
  local program
  for program in munged slurmctld slurmd sbatch; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || return 1
  done
}

if have; then exit 0; fi
if ! command -v apt-get >/dev/null; then
  echo "Slurm is missing and there is no apt-get: install slurmctld, slurmd, the client and munge; the tests are skipped"
  exit 0
fi
if [[ $EUID != 0 ]]; then
  echo "Slurm is missing and only root may install it: apt-get install slurm-wlm munge; the tests are skipped"
  exit 0
fi
# policy-rc.d: nothing that is installed may start itself.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  trap 'rm -f $policy' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
fi
install=(apt-get install --yes --quiet --no-install-recommends slurm-wlm munge)
export DEBIAN_FRONTEND=noninteractive
if ! "${install[@]}" >/dev/null 2>&1 && ! { apt-get update --quiet && "${install[@]}"; } >&2; then
  echo "Slurm could not be installed (no network?); the tests are skipped"
fi
