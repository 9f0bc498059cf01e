#!/usr/bin/env bash
# All that a machine with one NVIDIA GPU is asked. It needs no network.
#
#   benchmarks/gpu.sh [--quick] [PART...]
#
# Runs the parts named, or all. One that fails, or takes longer than PART_SECONDS (900), stops none of the others;
# the last lines say which passed, and the exit status is 1 if any failed. With --quick each benchmark is given
# --quick: so a machine without a GPU goes through all of it.
#
# JSON files and gpu.log go into the folder $OUT, or else a temporary one, which is named. $PYTHON (python3) is the
# interpreter; $HF_PYTHON (the same) one with torch, transformers and accelerate, without which what is compared
# with them is left out.
set -uo pipefail
cd "$(dirname "$0")/.."

parts=(step-fill facts real-qwen3 real-deepseek tests link overhead simulator policies real-mixtral calibrate host-experts
    resident hf-offload)  # what is most wanted first
quick=()
if [ "${1:-}" = --quick ]; then
    quick=(--quick)
    shift
fi
chosen=("$@")
[ $# -gt 0 ] || chosen=("${parts[@]}")
for part in "${chosen[@]}"; do
    [[ " ${parts[*]} " == *" $part "* ]] || {
        echo "error: parts are ${parts[*]}; got $part" >&2
        exit 2
    }
done

python=${PYTHON:-python3}
hf_python=${HF_PYTHON:-$python}
out=${OUT:-$(mktemp -d -t layerscope_gpu.XXXXXX)}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Parts compile much the same programs, and so does another run that is given this folder as JAX_COMPILATION_CACHE_DIR.
# The tests keep no cache, whatever is said here.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}
# XLA pins 64 GB at most, if nothing is said; real models take more, and the host needs some too.
available_gb=$(awk '/^MemAvailable/ { print int($2 / 1048576 * 3 / 4) }' /proc/meminfo)
export XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=${XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB:-$available_gb}

limited() { timeout --kill-after=10 "${PART_SECONDS:-900}" "$@"; }

bench() { # MODULE NAME OPTIONS...: one benchmark, whose results go to NAME.json
    local module=$1 name=$2
    shift 2
    limited "$python" -m "$module" "${quick[@]}" --json "$out/$name.json" "$@"
}

has() { "$hf_python" -c "import $1" 2>/dev/null; }

run() { # PART
    case $1 in
    tests) limited "$python" -m pytest -n 0 -p no:benchmark -rs -m gpu tests/runtime/test_gpu.py ;;
    step-fill) bench benchmarks.bench_step_fill step_fill ;;
    facts) bench benchmarks.bench_gpu_facts facts --pinned-limit "${XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB}GiB" ;;
    link) bench benchmarks.bench_link link --links 5GB unpaced ;;
    real-deepseek | real-qwen3 | real-mixtral)
        local -A models=([deepseek]=deepseek-v2-lite [qwen3]=qwen3-30b-a3b [mixtral]=mixtral-8x7b)
        bench benchmarks.bench_real_sizes "${1/-/_}" --models "${models[${1#real-}]}" --formats bfloat16 int4 \
            --prefill-tokens 512 4096
        ;;
    calibrate)
        limited "$python" -m layerscope_jax.cli calibrate shipped --device-budget 4MB --out "$out/profile.json"
        ;;
    host-experts) bench benchmarks.bench_host_experts host_experts ;;
    overhead) bench benchmarks.bench_overhead overhead ;;
    simulator) bench benchmarks.bench_simulator simulator --link 5GB ;;
    policies)
        bench benchmarks.bench_policies policies --budgets 25 --links 500MB 5GB \
            --policies host-only on-demand lru fiddler hybrimoe presched in-step auto
        ;;
    resident)
        local peer=()
        has "torch, transformers" && peer=(--hf-python "$hf_python")
        # JAX would take nearly all of the GPU's memory, and leave the peer none.
        XLA_PYTHON_CLIENT_MEM_FRACTION=.4 bench benchmarks.bench_resident resident "${peer[@]}"
        ;;
    hf-offload)
        has "torch, transformers, accelerate" || {
            echo "skipped: $hf_python has not all of torch, transformers and accelerate"
            return 77
        }
        XLA_PYTHON_CLIENT_MEM_FRACTION=.4 bench benchmarks.bench_hf_offload hf_offload --hf-python "$hf_python"
        ;;
    esac
}

echo "results go to $out"
: >"$out/gpu.log"
summary=()
failed=0
for part in "${chosen[@]}"; do
    began=$SECONDS
    echo "== $part" | tee -a "$out/gpu.log"
    run "$part" 2>&1 | tee -a "$out/gpu.log"
    case ${PIPESTATUS[0]} in
    0) state=passed ;;
    77) state=skipped ;;
    124 | 137) state="failed, out of time" failed=1 ;;
    *) state=failed failed=1 ;;
    esac
    summary+=("$(printf '%-14s %4d s  %s' "$part" $((SECONDS - began)) "$state")")
done
{
    echo
    printf '%s\n' "${summary[@]}"
    echo "results are in $out"
} | tee -a "$out/gpu.log"
exit $failed
