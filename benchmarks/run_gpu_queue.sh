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

steps=(kernel_build kernel_tests kernel_sanitizer kernel_benchmark
    train_vq prepare_tokens train_coglm train_direct_sr train_iterative_sr assemble_model evaluate_model)

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

# The model of all emoji scenes at 20 x 20 to 60 x 60 tokens (training_scripts/emoji/README.md). The full-size drawings and the
# tokenizer are made beforehand; a training that ran out of time goes on where it was when its step is run again.
emoji=training_scripts/emoji/gpu

train() {
    local name=$1 limit=$2 script=$3 config=$4 folder=$5
    step "$name" $((limit + 60)) "$python" "training_scripts/$script" --config "$emoji/$config" --output_dir "$folder" \
        --resume_from_checkpoint latest --max_minutes $((limit / 60))
}
train_vq() { train train_vq 300 train_vq_model.py vq.yaml runs/gpu/vq; }
prepare_tokens() { step prepare_tokens 300 "$python" training_scripts/prepare_tokens.py --config "$emoji/tokens.yaml"; }
train_coglm() { train train_coglm 480 train_coglm.py coglm.yaml runs/gpu/coglm; }
train_direct_sr() { train train_direct_sr 300 train_direct_sr.py direct_sr.yaml runs/gpu/direct_sr; }
train_iterative_sr() { train train_iterative_sr 300 train_iterative_sr.py iterative_sr.yaml runs/gpu/iterative_sr; }
assemble_model() {
    step assemble_model 60 "$python" training_scripts/assemble_pipeline.py --config "$emoji/pipeline.yaml" --output_dir "$out/model"
}
evaluate_model() {
    step evaluate_model 400 "$python" benchmarks/evaluate_emoji_model.py --model "$out/model" --num 50 --output "$out/model.jsonl"
}

for name in "${@:-${steps[@]}}"; do
    if ! declare -F "$name" >/dev/null; then
        echo "no step \`$name\`; there are: ${steps[*]}" >&2
        exit 2
    fi
    "$name"
done
