#!/usr/bin/env bash
# Every figure that issue 7 asks for, on one GPU (meant for an H200), into benchmarks/results/gpu-*.
#   pip install -e '.[dev]'; benchmarks/gpu_session.sh [RESULTS]
# 20 full layers of mini in bfloat16 take 33 GB of the card and of the host. Nobody else should use the card.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-benchmarks/results}
python=${PYTHON:-python}
unset TRITON_INTERPRET
export HF_HUB_OFFLINE=1
mkdir -p "$results"

# Correct first: the tests of the kernels, compiled, bfloat16, captured forwards and whole answers by replays among them.
$python -m pytest -q -m cuda tests

# Selection: under 20 us a layer inside the graph.
$python benchmarks/gpu_selection.py --out "$results/gpu-selection.json"
$python benchmarks/gpu_selection.py --blocks 16 --out "$results/gpu-selection-16-blocks.json"

# Experts: at least 75 % of copy bandwidth for 12 to 128 unique; 16 unique at most 35 % of 70 unique.
for case in llada2.0-mini llada2.0-flash; do
    $python -m expertshare bench experts --device cuda --case "$case" --unique 12,16,24,32,48,70,128 --repeats 50 \
        --report "$results/gpu-experts-$case.json" --plot "$results/gpu-experts-$case.png"
done
$python -m expertshare bench experts --device cuda --case llada2.0-mini --tokens 2,4,8,16,32,64 --unique 16 --repeats 50 \
    --backends triton,triton-int8,triton-int4,grouped --report "$results/gpu-experts-tokens.json"

# A whole denoise step of 20 layers: 1.66x with a coreset of 15, 3x transformers' grouped_mm with the same routing.
$python -m expertshare bench forward --device cuda --case llada2.0-mini --layers 20 --repeats 50 \
    --policies vanilla,des-vote:budget=15,block-top-p --report "$results/gpu-forward-mini.json" \
    --plot "$results/gpu-forward-mini.png"

# Whole answers of 20 layers, each step a replay or launched kernel by kernel, and the plain loop over transformers.
$python -m expertshare bench generate --device cuda --case llada2.0-mini --layers 20 --limit 4 --gen-length 128 \
    --batch-sizes 1,4 --policies vanilla,des-vote:budget=15 --repeats 5 \
    --backends triton,triton-no-graphs,grouped,transformers-grouped-mm --report "$results/gpu-generate-mini.json" \
    --plot "$results/gpu-generate-mini.png"

# Experts in pinned host memory, a coreset on the card. Needs 33 GB each of disk, card and host memory.
model=${MODEL:-build/mini}
$python -m expertshare make-checkpoint --like llada2.0-mini --quantise none --out "$model"
$python benchmarks/gpu_store.py "$model" --budgets 4GiB,8GiB,all --host-memory all --json "$results/gpu-store-mini.json"
