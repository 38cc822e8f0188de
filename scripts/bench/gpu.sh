#!/usr/bin/env bash
# The expert kernels on a GPU: correctness against float64, then time against the roofline and against torch, in one call
# of less than 8 minutes: scripts/bench/gpu.sh [--out DIRECTORY] [--tune] [--layers NAME...] [--dry-run]; --help has more.
# Needs a Python with torch and triton (PYTHON names it; default python3) and this checkout; installs nothing. Prints a
# table and writes DIRECTORY/gpu.json (default build/bench). Exit code 1: wrong results; 2: something was left out.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
packages="$(mktemp -d)"
trap 'rm -rf "$packages"' EXIT
mkdir "$packages/moehive"
ln -s "$root/kernels" "$packages/moehive/kernels"  # the import name, without an installation
export PYTHONPATH="$packages:$root/scripts:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_DEFAULT_FP_FUSION=1                  # its default is about to change, and unset is a warning
for option; do
    if [[ $option == --dry-run ]]; then export TRITON_INTERPRET=1; fi
done
cd "$root"
"${PYTHON:-python3}" -m gpu_bench "$@"
