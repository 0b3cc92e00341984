#!/usr/bin/env bash
# Everything that needs a GPU, in the order of what it tells. benchmarks/README.md says what to prepare on a machine with
# a network, and how the steps fit into a first quarter of an hour and the calls after it.
#
#   benchmarks/run_gpu_queue.sh first                    # a group: also correctness, speed, training, studies
#   benchmarks/run_gpu_queue.sh kernel_build kernel_tests  # single steps
#   benchmarks/run_gpu_queue.sh --list                   # all steps; --groups: all groups
#   STEPS_DEVICE=cpu benchmarks/run_gpu_queue.sh         # rehearsal of all groups on a CPU, with tiny models and sizes
#
# Each step is bounded in time, does not stop the others when it fails, and is left out of a group once it has passed;
# named alone, it runs again. Training goes on from its last checkpoint.
#
#   QUEUE_SECONDS  a group starts no step, and lets none run, beyond this (default: 580)
#   OUT            folder for the few files to bring home, kept up to date: summary.txt, results.tar.gz, model.tar.*
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device=${STEPS_DEVICE:-cuda}
python=${PYTHON:-python3}
inputs=${GPU_INPUTS:-gpu_inputs}
seconds=${QUEUE_SECONDS:-$([ "$device" = cpu ] && echo 36000 || echo 580)}
end=$((SECONDS + seconds))
kept=0 # of these seconds, how many in a hundred a step leaves to those after it

first=(kernel_build kernel_tests kernel_opcheck memcheck parity kernel_times generation_times sharded_training)
correctness=(gpu_tests racecheck train_vq prepare_tokens kernel_benchmark)
speed=(generation_benchmark generation_baseline parallel_width training_benchmark generation_profile generation_capped
    train_coglm)
training=(finish_coglm train_direct_sr train_iterative_sr assemble_model evaluate_model pack_model)
studies=(parallel_passes sparse_benchmark cogview_benchmark overflow_study)
groups="first correctness speed training studies"

name=gpu
[ "$device" = cpu ] && name=rehearsal
work=outputs/${name}_queue runs=runs/$name tokens=data/${name}_tokens scope=training_scripts/emoji/gpu/scope.json
mkdir -p "$work/done" "$work/logs"
export PYTHONUNBUFFERED=1 PYTHONPATH="src:$work/site${PYTHONPATH:+:$PYTHONPATH}"

# One table of sizes: minutes of training, and what makes everything tiny in a rehearsal.
if [ "$device" = cuda ]; then
    vq_minutes="2.2 1.4" coglm_minutes="3.2 2.5" sr_minutes="1.3 0.9"
    tiny() { :; }
else
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} COGVIEW_CUDA=0
    vq_minutes="0.02 0.02" coglm_minutes="0.02 0.02" sr_minutes="0.02 0.02" scope=$work/scope.json
    tiny() {
        local training=(--batch_size 2 --warmup_steps 1 --sample_every_steps 1 --data_workers 2)
        local coglm='"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2'
        case $1 in
            vq) options+=("${training[@]}" --num_scenes 24 --resolutions 32 96 --crop_size 32 --model '{
                "num_embeddings": 2048, "embedding_dim": 8, "base_channels": 8, "norm_type": "position", "num_clusters": 8,
                "mid_attention": false, "compression_rates": [8], "local_encoder": true, "encoder_patch_size": 8,
                "encoder_channel_multipliers": [1], "num_res_blocks": 1, "decoder_patch_size": 2,
                "decoder_channel_multipliers": {"8": [1, 1, 1]}}') ;;
            tokens) options+=(--max_pairs 8 --low_size 32 --fine_size 96 --batch_size 8 --data_workers 0) ;;
            coglm) options+=("${training[@]}" --model "{$coglm, \"max_text_tokens\": 31, \"image_position\": 40,
                \"max_position_embeddings\": 64}") ;;
            direct_sr) options+=("${training[@]}" --model '{"num_text_slots": 32}') ;;
            iterative_sr) options+=("${training[@]}" --model "{$coglm, \"intermediate_size\": 64, \"num_text_slots\": 24}") ;;
            kernel_tests) options+=(-k "border or coarse_cell" -m "not gpu") ;;
            kernel_opcheck) options+=(-k opcheck -m "not gpu") ;;
            parity) options+=(-k "text or sampling") ;;
            gpu_tests) options+=(-k sampling -m "not gpu and not slow") ;;
            kernel_benchmark | kernel_times) options+=(--cases shipped_direct_b1_float32 --seconds 0.1) ;;
            generation_benchmark | generation_baseline | generation_capped | generation_times)
                options+=(--cases tiny_b1 --seconds 1) ;;
            generation_profile) options+=(--small) ;;
            training_benchmark | sharded_training) options+=(--cases small --seconds 0.1) ;;
            parallel_width) options+=(--hidden-size 64 --num-layers 2 --windows 4) ;;
            parallel_passes) options+=(--num 2 --windows 32) ;;
            sparse_benchmark) options+=(--lengths 2048 --dtype float32 --num_heads 1 --batch_size 1 --seconds 0.1) ;;
            cogview_benchmark) options=(--tiny --hidden_size 32 --num_layers 2 --num_heads 2 --repeats 1) ;;
            overflow_study) options+=(--num_layers 2 --hidden_size 32 --num_heads 2 --steps 2 --num_scenes 8) ;;
            evaluate) options+=(--num 2) ;;
        esac
    }
fi

# say WORDS: a line for the terminal and the summary
say() { printf '%s\n' "$*" | tee -a "$work/summary.txt"; }

# step NAME SECONDS COMMAND...: run it, bounded, into a log of its own
step() {
    local name=$1 limit=$2 start=$SECONDS left code
    shift 2
    left=$((end - start - seconds * kept / 100))
    [ "$device" = cpu ] && limit=$((10 * limit)) # the limits are for a fast machine
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        say "$(printf '%-22s no time left' "$name")"
        return 1
    fi
    timeout -k 5 "$limit" "$@" >"$work/logs/$name.log" 2>&1
    code=$?
    case $code in
        0) touch "$work/done/$name" ;;
        5) [ "$1 $2 $3" = "$python -m pytest" ] && code="5 (no test was chosen)" ;;
        124 | 137) code="$code (time was over)" ;;
    esac
    say "$(printf '%-22s %-9s %4d s   %s' "$name" "$([ "$code" = 0 ] && echo passed || echo failed)" $((SECONDS - start)) \
        "$([ "$code" = 0 ] || echo "exit status $code: $(tail -n 1 "$work/logs/$name.log" | cut -c 1-100)")")"
    pack
    [ "$code" = 0 ]
}

# json NAME SECONDS SCRIPT OPTIONS...: the JSON lines that a benchmark prints are kept, those of an interrupted one too
json() {
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" bash -c 'set -o pipefail; "${@:2}" | tee "$1"' _ "$work/$name.jsonl" "$python" "$@"
}

# What is brought home: as few files as possible, and whole at any moment.
pack() {
    [ -n "${OUT:-}" ] || return 0
    (
        flock 9
        mkdir -p "$OUT"
        find "$work" "$runs" \( -name '*.log' -o -name '*.jsonl' -o -name 'summary.txt' -o -name pace.json \) 2>/dev/null |
            tar -czf "$OUT/.results.tar.gz" -T - 2>/dev/null
        mv "$OUT/.results.tar.gz" "$OUT/results.tar.gz"
        cp "$work/summary.txt" "$OUT/summary.txt"
    ) 9>"$work/.lock"
}

# What was made beforehand comes to its places: packages that are missing here, drawings, the tokenizer.
prepare() {
    local wheel wheels=()
    for wheel in "$inputs"/*/*.whl; do
        [ -e "$wheel" ] && [ ! -e "$work/done/${wheel##*/}" ] && wheels+=("$wheel")
    done
    if [ ${#wheels[@]} -gt 0 ] && [ "$device" = cuda ]; then
        if "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$work/site" "${wheels[@]}" \
            >>"$work/logs/prepare.log" 2>&1; then
            touch "${wheels[@]/#*\//$work/done/}"
        else
            say "prepare: the packages in $inputs cannot be installed"
        fi
    fi
    if [ -f "$inputs/training/sprites.tar" ] && [ ! -d data/sprites ]; then
        mkdir -p data/sprites && tar -xf "$inputs/training/sprites.tar" -C data/sprites
    fi
    if [ -d "$inputs/training/tokenizer" ] && [ ! -d "$runs/tokenizer" ]; then
        mkdir -p "$runs" && cp -r "$inputs/training/tokenizer" "$runs/"
    fi
    [ "$device" = cpu ] && cat >"$scope" <<'SCOPE'
{"concepts": ["1f436", "1f431", "1f42f", "1f34e", "1f697", "2b50"], "styles": ["noto"], "layouts": ["single", "pair"],
 "backgrounds": ["white", "pink", "red", "orange", "yellow", "green", "blue", "purple", "brown", "gray", "black"]}
SCOPE
    "$python" -c "from cogview_pipelines.environment import devices, versions; print(versions(), devices())" \
        >"$work/logs/machine.log" 2>&1
    say "$(date -u +%FT%TZ) $(tail -n 1 "$work/logs/machine.log" | cut -c 1-600)"
}

# ---------------------------------------------------------------------------------------------------------- correctness

# The library is built in place for the architecture of this machine alone, which takes a quarter of the time.
kernel_build() {
    local architecture
    architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
    COGVIEW_REQUIRE_KERNELS=1 COGVIEW_CUDA_ARCHITECTURES=${architecture:-90} step kernel_build 300 \
        "$python" setup.py build_ext --inplace
}

# tests NAME SECONDS OPTIONS...: several at a time where pytest-xdist is there
tests() {
    local name=$1 limit=$2 options=(-q -p no:cacheprovider)
    shift 2
    [ "$device" = cuda ] && "$python" -c "import xdist" 2>/dev/null && options+=(-n 6)
    options+=("$@")
    tiny "$name"
    step "$name" "$limit" "$python" -m pytest "${options[@]}"
}
chosen="accurate_as_pytorch and (causal or one_row or all or context) and not released"
kernel_tests() { tests kernel_tests 240 tests/ops -m gpu -k "not opcheck and not compiles and not graph"; }
kernel_opcheck() { tests kernel_opcheck 120 tests/ops -m "gpu or not gpu" -k "opcheck or compiles or graph"; }
parity() { tests parity 150 tests/parity --device "$device"; }
gpu_tests() { tests gpu_tests 200 tests -m gpu --ignore tests/ops; }

# Out-of-bounds accesses, and races in shared memory, on small shapes.
sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        say "$(printf '%-22s left out: no compute-sanitizer here' "$1")"
        return 0
    fi
    step "$1" 200 compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-name kns=local_attention \
        "$python" -m pytest tests/ops/test_local_attention_cuda.py -q -m gpu -p no:cacheprovider -k "$chosen"
}
memcheck() { sanitizer memcheck; }
racecheck() { sanitizer racecheck; }

# ---------------------------------------------------------------------------------------------------------------- speed

benchmark() {
    local name=$1 limit=$2 script=$3 options=(--device "$device" --json "${@:4}")
    tiny "$name"
    json "$name" "$limit" "benchmarks/$script.py" "${options[@]}"
}
kernel_benchmark() { benchmark kernel_benchmark 150 bench_local_attention; }
# Of the first group: what is most wanted of the two that are longer.
kernel_times() {
    benchmark kernel_times 70 bench_local_attention --seconds 0.3 \
        --cases 60x60_9x5_b1 60x60_9x5_cross_b1 60x60_9x5_context_b1 64x64_9x9_b1
}
generation_times() { benchmark generation_times 80 bench_generation --seconds 3 --cases released_b1; }
generation_benchmark() { benchmark generation_benchmark 150 bench_generation --seconds 6; }
generation_baseline() { benchmark generation_baseline 110 bench_generation --baseline --seconds 6 --cases released_b1; }
generation_capped() { benchmark generation_capped 220 bench_generation --seconds 6 --cases capped --folder "$work/random6b"; }
# A pass over several positions against one, with layers of the released shape: what parallel decoding costs.
parallel_width() {
    local options=(--case width --device "$device" --dtype bfloat16 --hidden-size 3072 --num-layers 48)
    options+=(--windows 2,4,8,16,32,64,100)
    tiny parallel_width
    json parallel_width 60 benchmarks/bench_parallel_decoding.py "${options[@]}"
}
training_benchmark() { benchmark training_benchmark 70 bench_training; }
# Shared out by FSDP over the one GPU that there is; twelve layers of the released width and their optimizer take 30 GB.
sharded_training() { benchmark sharded_training 80 bench_training --cases 6b --layers 12 --sharded; }
generation_profile() {
    local options=(--device "$device")
    tiny generation_profile
    step generation_profile 60 "$python" benchmarks/profile_generation.py "${options[@]}"
}

# -------------------------------------------------------------------------------------------------------------- studies

# The shipped model in 16 bits: passes, and pictures whose tokens differ from those written one by one.
parallel_passes() {
    local options=(--device "$device" --dtype bfloat16 --num 40 --windows 32)
    tiny parallel_passes
    json parallel_passes 80 benchmarks/bench_parallel_decoding.py "${options[@]}"
}
# Three-region attention of CogView2's paper beside dense attention.
sparse_benchmark() {
    local options=(--device "$device" --dtype bfloat16 --batch_size 4 --num_heads 16)
    tiny sparse_benchmark
    json sparse_benchmark 60 benchmarks/bench_sparse_attention.py "${options[@]}"
}
# The first CogView beside CogView2, with released sizes of the first.
cogview_benchmark() {
    local options=(--device "$device" --dtype float16 --hidden_size 2560 --num_layers 48 --num_heads 40 --repeats 1)
    tiny cogview_benchmark
    json cogview_benchmark 250 benchmarks/bench_cogview_cogview2.py "${options[@]}"
}
# 64 layers of 1,024 in float16, as in the paper of CogView.
overflow_study() {
    local options=(--device "$device" --output_dir "$work/overflow" --hidden_size 1024 --num_heads 16 --steps 400)
    tiny overflow_study
    json overflow_study 320 benchmarks/study_overflow.py "${options[@]}"
}

# ------------------------------------------------------------------------------------------------------------- training
# The model of all emoji scenes at 20 x 20 to 60 x 60 tokens (training_scripts/emoji/README.md): as many steps as the
# minutes are good for.

# train STEP SCRIPT STAGE PARTS MINUTES OPTIONS...
train() {
    local name=$1 script=$2 stage=$3 parts=$4 minutes=($5) options=(--config "training_scripts/emoji/gpu/$3.yaml")
    shift 5
    options+=(--output_dir "$runs/$stage" --sample_every_steps 0 "$@") # pictures take seconds; the model is looked at later
    tiny "$stage"
    # too little shared memory for batches from other processes: threads prepare them
    [ "$(df -k --output=avail /dev/shm 2>/dev/null | tail -n 1)" -gt 4000000 ] 2>/dev/null ||
        options+=(--data_processes false)
    local part label time index=0
    for part in $parts; do
        [ "$part" = cooldown ] && index=1
        label=$name
        [ "$part" = "${parts##* }" ] || label=${name}_$part
        [ -e "$work/done/$label" ] && [ "$label" != "$name" ] && continue
        # no more than is left, with room for loading and saving
        time=$(awk -v wanted="${minutes[$index]}" -v left=$((end - SECONDS)) \
            'BEGIN { left = (left - 45) / 60; if (left > wanted) left = wanted; print (left < 0.02 ? 0.02 : left) }')
        step "$label" "$(awk -v minutes="$time" 'BEGIN { print int(minutes * 78 + 75) }')" \
            "$python" benchmarks/train_for.py "$part" --minutes "$time" "$script" "${options[@]}" || return 1
    done
}
parts="--tokenizer $runs/tokenizer --vqvae $runs/vq/final --data $tokens"
train_vq() { train train_vq train_vq_model vq "steady cooldown" "$vq_minutes" --scope "$scope"; }
train_coglm() { train train_coglm train_coglm coglm steady "$coglm_minutes" $parts; }
finish_coglm() { train finish_coglm train_coglm coglm cooldown "$coglm_minutes" $parts; }
train_direct_sr() {
    train train_direct_sr train_direct_sr direct_sr "steady cooldown" "$sr_minutes" $parts --transformer "$runs/coglm/final"
}
train_iterative_sr() {
    train train_iterative_sr train_iterative_sr iterative_sr "steady cooldown" "$sr_minutes" $parts \
        --transformer "$runs/coglm/final"
}
prepare_tokens() {
    local options=(--config training_scripts/emoji/gpu/tokens.yaml --vqvae "$runs/vq/final" --output_dir "$tokens")
    options+=(--scope "$scope" --device "$device")
    tiny tokens
    step prepare_tokens 200 "$python" training_scripts/prepare_tokens.py "${options[@]}"
}

assemble_model() {
    local stage options=(--config training_scripts/emoji/gpu/pipeline.yaml --output_dir "$work/model")
    options+=(--tokenizer "$runs/tokenizer" --vqvae "$runs/vq/final" --transformer "$runs/coglm/final")
    options+=(--files "{\"scope.json\": \"$scope\"}")
    for stage in direct_sr iterative_sr; do
        options+=("--${stage}_transformer" "$runs/$stage/final")
    done
    step assemble_model 60 "$python" training_scripts/assemble_pipeline.py "${options[@]}"
}
evaluate_model() {
    local options=(--model "$work/model" --output "$work/evaluation.jsonl" --device "$device" --num 16 --batch-size 64 --sprites data/sprites)
    tiny evaluate
    step evaluate_model 100 "$python" benchmarks/evaluate_emoji_model.py "${options[@]}"
}
# In pieces that can be brought home one by one; `cat model.tar.* | tar -x` puts them together.
pack_model() {
    step pack_model 30 bash -c 'mkdir -p "$1" && tar -c -C "$2" model | split -b 15M -d - "$1/model.tar."' _ "${OUT:-$work}" "$work"
}

# --------------------------------------------------------------------------------------------------------------- groups

# one by one, without those that passed before
lane() {
    local name
    for name in "$@"; do
        [ -e "$work/done/$name" ] || "$name"
    done
}
# A step that takes long leaves their time to those after it: what a GPU is lent for first comes to its turn.
group_first() {
    kept=55 lane kernel_build
    kept=38 lane memcheck &
    kept=38 lane kernel_tests kernel_opcheck parity
    wait
    kept=26 lane kernel_times
    kept=13 lane generation_times
    lane sharded_training
}
group_correctness() {
    # The tests leave most of the GPU free: the image tokenizer trains beside them. Times are measured alone.
    lane train_vq prepare_tokens &
    lane kernel_build
    lane memcheck racecheck &
    lane kernel_tests kernel_opcheck parity gpu_tests
    wait
    lane kernel_benchmark
}
group_speed() {
    lane generation_benchmark generation_baseline parallel_width sharded_training training_benchmark generation_profile
    # with capped memory, transfers take most of the time: CogLM trains beside them
    lane generation_capped &
    lane train_coglm
    wait
}
group_training() {
    lane finish_coglm
    lane train_direct_sr &
    lane train_iterative_sr
    wait
    lane assemble_model pack_model evaluate_model
}

group_studies() { lane "${studies[@]}"; }

steps=("${first[@]}" "${correctness[@]}" "${speed[@]}" "${training[@]}" "${studies[@]}")
case ${1:-} in
    --list)
        printf '%s\n' "${steps[@]}"
        exit ;;
    --groups)
        printf '%s\n' $groups
        exit ;;
esac
for name in "$@"; do
    case " $groups ${steps[*]} " in
        *" $name "*) ;;
        *)
            echo "no step \`$name\`; there are the groups ${groups// /, } and the steps ${steps[*]}" >&2
            exit 2
            ;;
    esac
done
[ $# -gt 0 ] || set -- $groups
prepare
for name in "$@"; do
    case " $groups " in
        *" $name "*) "group_$name" ;;
        *) "$name" ;;
    esac
done
pack
