#!/usr/bin/env bash
# Fills a wheel house for the Dockerfile: everything that megavlm needs and this image lacks, as wheels, those of CUDA
# sources compiled. The only step of the image's build that uses the network.
#   tools/image/wheels.sh OUT [requirement ...]     from the directory that has setup.py and constraints.txt
# TE_VERSION: Transformer Engine to compile, empty for none (or for the image's own). APEX: directory of Apex's source.
set -euo pipefail

out=$(realpath -m "${1:?usage: wheels.sh OUT [requirement ...]}")
shift
PYTHON=${PYTHON:-python3}
pip=("$PYTHON" -m pip --disable-pip-version-check)
unset PIP_CONSTRAINT # NGC's images pin much that is not of one piece with torch; what is stays, below
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"

# What must stay as the image has it, as its parts were built for each other; for the rest our own versions, but of
# setuptools, which torch bounds.
stays='torch|torchvision|triton|pytorch[-_]triton|numpy|apex|flash[-_]attn|transformer[-_]engine.*|nvidia-.*cu1[0-9]'
"${pip[@]}" list --format=freeze | grep -iE "^($stays)==" >"$work/image.txt" || : # none
kept=$(cut -d = -f 1 "$work/image.txt" | tr '_\n' '-|')
grep -viE "^(${kept}#|torch|setuptools)==" constraints.txt | grep -E '^[A-Za-z0-9]' >"$work/ours.txt"
cat "$work/image.txt"

"$PYTHON" setup.py --quiet egg_info --egg-base "$work"
"$PYTHON" - "$work"/megavlm.egg-info/requires.txt >"$work/needs.txt" <<'PYTHON'
import sys

from packaging.markers import Marker

plain, *sections = open(sys.argv[1]).read().split("\n[")  # then [extra] or [:marker], each with what it needs
print(plain.strip())
for section in sections:
    head, _, body = section.partition("]")
    extra, _, marker = head.partition(":")
    if not extra and Marker(marker).evaluate():
        print(body.strip())
PYTHON
printf '%s\n' "$@" >>"$work/needs.txt"
if [[ -n ${TE_VERSION:-} ]] && ! grep -qi '^transformer[-_]engine' "$work/image.txt"; then
  # Compiled against the image's torch. With torch from pip, cuDNN's headers lie beside its libraries.
  includes=$("$PYTHON" -c 'import glob, site
print(":".join(path for root in site.getsitepackages() for path in glob.glob(root + "/nvidia/*/include")))')
  CPATH="$includes${CPATH:+:$CPATH}" NVTE_FRAMEWORK=pytorch "${pip[@]}" wheel --no-build-isolation --no-deps \
    --wheel-dir "$out" "transformer-engine-torch==$TE_VERSION"
  cuda=$("$PYTHON" -c 'import torch; print(torch.version.cuda.split(".")[0])')
  echo "transformer-engine[core-cu$cuda,pytorch]==$TE_VERSION" >>"$work/needs.txt"
fi
if [[ -n ${APEX:-} ]]; then
  APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "${pip[@]}" wheel --no-build-isolation --no-deps --wheel-dir "$out" "$APEX"
fi

# pip says what would be installed beside what is here; that, and no more, is fetched.
"${pip[@]}" install --dry-run --quiet --find-links "$out" --report "$work/report.json" \
  --requirement "$work/needs.txt" --constraint "$work/image.txt" --constraint "$work/ours.txt"
"$PYTHON" - "$work/report.json" >"$work/lock.txt" <<'PYTHON'
import json, sys

for item in json.load(open(sys.argv[1]))["install"]:
    print(f"{item['metadata']['name']}=={item['metadata']['version']}")
PYTHON
"${pip[@]}" wheel --quiet --no-deps --find-links "$out" --wheel-dir "$out" --requirement "$work/lock.txt"
sort -f "$work/lock.txt" >"$out/lock.txt"
if [[ -n ${APEX:-} ]]; then echo apex >>"$out/lock.txt"; fi
echo "$(wc -l <"$out/lock.txt") packages in $out"
