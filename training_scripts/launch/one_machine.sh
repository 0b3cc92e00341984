#!/usr/bin/env bash
# A training script on all GPUs of this machine, sharded; started again where it left off when a process dies.
#
#   bash training_scripts/launch/one_machine.sh train_coglm --config CONFIG.yaml --output_dir runs/coglm
#
# PROCESSES (default: the number of GPUs) and RESTARTS (default: 3) come from the environment. The status is 0 when the
# run is finished and 75 when it was stopped after a checkpoint: start the same line again.
set -u
script=$1
shift
folder=
for ((i = 1; i < $#; i++)); do
    [ "${!i}" = --output_dir ] && j=$((i + 1)) && folder=${!j}
done
[ -n "$folder" ] || { echo "--output_dir is missing" >&2; exit 2; }

# else processes that are started again read the addresses of those that died, and wait for them
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun --standalone --nproc_per_node "${PROCESSES:-gpu}" --max_restarts "${RESTARTS:-3}" \
    "$(dirname "$0")/../$script.py" --sharding full --resume_from_checkpoint latest "$@"
status=$?
# torchrun has one status for all failures; the run's own state tells an interruption from an error
grep -q '"state": "interrupted"' "$folder/run.json" 2>/dev/null && exit 75
exit "$status"
