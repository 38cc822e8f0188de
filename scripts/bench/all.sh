#!/usr/bin/env bash
# Runs every benchmark, one after the other, and writes what docs/benchmarks.md shows: scripts/bench/all.sh [DIRECTORY]
# Tables go to DIRECTORY/NAME.md (default: build/bench), numbers of those that give them to NAME.json. About 45 minutes on
# 2 cores; nothing else should run meanwhile. PYTHON says which interpreter has moehive installed.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
out="${1:-$root/build/bench}"
mkdir -p "$out"
failed=()

bench() { # NAME [OPTION...]: a failure does not hide the benchmarks after it
    local start=$SECONDS
    "$python" "$root/scripts/bench/$1.py" "${@:2}" | tee "$out/$1.md" || failed+=("$1")
    printf -- '--- %s: %d s\n\n' "$1" $((SECONDS - start))
}

bench expert_request --json "$out/expert_request.json"
bench hivemind_moe --json "$out/hivemind_moe.json"
bench demo --json "$out/demo.json"
bench local --json "$out/local.json"
bench telemetry --json "$out/telemetry.json"
bench cpu_experts --shapes qwen3-30b-a3b --budget 10 --json "$out/cpu_experts.json"  # Mixtral takes six minutes more
bench cpu_quantised --json "$out/cpu_quantised.json"
bench expert_forms --json "$out/expert_forms.json"
bench long_context --json "$out/long_context.json"
bench buffers --json "$out/buffers.json"
bench tiers --json "$out/tiers.json" --plot "$out/tiers.svg"
bench memory_limit --json "$out/memory_limit.json"
bench transfer_sources --json "$out/transfer_sources.json"
bench convert
bench load --json "$out/load.json"
bench scheduler --json "$out/scheduler.json"
bench faults --json "$out/faults.json"
bench hostile --json "$out/hostile.json"
bench churn --json "$out/churn.json"
bench repair --json "$out/repair.json"
bench wan --json "$out/wan.json"
bench transfer --json "$out/transfer.json"

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[*]}" >&2
    exit 1
fi
