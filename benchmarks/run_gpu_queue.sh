#!/usr/bin/env bash
# Everything that needs a GPU, in the order of what it tells. Each step is bounded in time, can be run alone, and does not
# stop the others when it fails:
#
#   benchmarks/run_gpu_queue.sh                 # all steps
#   benchmarks/run_gpu_queue.sh kernel_build kernel_tests
#   STEPS_DEVICE=cpu benchmarks/run_gpu_queue.sh kernel_benchmark   # a rehearsal on a CPU, with small sizes
#
# Results go to $OUT (default: outputs/gpu_queue): a log for each step, JSON lines of the benchmarks, and summary.txt.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-outputs/gpu_queue}
device=${STEPS_DEVICE:-cuda}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}

steps=(kernel_build kernel_tests kernel_sanitizer kernel_benchmark)

# name of the step, seconds that it may take, command
step() {
    local name=$1 limit=$2
    shift 2
    local start=$SECONDS
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    printf '%-20s %-8s %4d s\n' "$name" "$([ $code -eq 0 ] && echo passed || echo "code $code")" $((SECONDS - start)) | tee -a "$out/summary.txt"
}

# The library is built in place for the architecture of this machine alone, which takes a quarter of the time.
kernel_build() {
    local architecture
    architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
    [ "$device" = cpu ] && export COGVIEW_CUDA=0
    COGVIEW_REQUIRE_KERNELS=1 COGVIEW_CUDA_ARCHITECTURES=${architecture:-90} step kernel_build 400 "$python" setup.py build_ext --inplace
}

kernel_tests() {
    local marker=gpu
    [ "$device" = cpu ] && marker="not gpu and not slow"
    step kernel_tests 500 "$python" -m pytest tests/ops -q -m "$marker" -p no:cacheprovider
}

# Out-of-bounds accesses and races in shared memory, on small shapes.
kernel_sanitizer() {
    local tool tests="tests/ops/test_local_attention_cuda.py"
    if ! command -v compute-sanitizer >/dev/null; then
        echo "kernel_sanitizer     no compute-sanitizer here" | tee -a "$out/summary.txt"
        return
    fi
    for tool in memcheck racecheck; do
        step "kernel_sanitizer_$tool" 400 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name kns=local_attention \
            "$python" -m pytest $tests -q -m gpu -p no:cacheprovider -k "accurate_as_pytorch and (causal or one_row or all or context) and not released"
    done
}

kernel_benchmark() {
    local options=(--device "$device" --json)
    [ "$device" = cpu ] && options+=(--cases shipped_direct_b1_float32 --seconds 0.1)
    step kernel_benchmark 580 bash -c '"$0" benchmarks/bench_local_attention.py "${@:2}" >"$1"' "$python" "$out/local_attention.jsonl" "${options[@]}"
}

for name in "${@:-${steps[@]}}"; do
    if ! declare -F "$name" >/dev/null; then
        echo "no step \`$name\`; there are: ${steps[*]}" >&2
        exit 2
    fi
    "$name"
done
