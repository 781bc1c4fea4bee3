#!/usr/bin/env bash
# Exit code 0: dbdist can be imported, and trains one small block for two steps on the CPU.
#
# Docker runs this beside a training: on one core, without a GPU, and bounded in time by itself,
# because Docker's own timeout would leave its files behind.
set -euo pipefail

folder=$(mktemp --directory)
trap 'rm -rf "$folder"' EXIT
unset RANK WORLD_SIZE  # one process by itself, whatever started the container
export TMPDIR=$folder CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1

if ! timeout --kill-after=5 150 dbdist train --device cpu --run_dir "$folder/run" \
    --model.num_blocks 1 --model.num_layers 1 --model.hidden_size 16 \
    --train.max_steps 2 --train.batch_size 32 >"$folder/log" 2>&1; then
    tail -c 2000 "$folder/log" >&2  # Docker keeps 4096 bytes
    exit 1
fi
