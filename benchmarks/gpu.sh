#!/bin/sh
# What only a GPU can say: do the kernels of mamba-ssm agree with their definitions, and how fast are the students.
#
#     sh benchmarks/gpu.sh [FOLDER]        writes kernels.json, latency-eager.json and latency-compiled.json (default: gpu)
#
# Not yet run: it was written on a machine without a GPU. Needs one of 40 GB or more, CUDA's torch, and mamba-ssm built
# with MAMBA_KEEP_CUDA_BUILD=TRUE; without mamba-ssm the plain scans are measured, and the files say so.
set -e
out=${1:-gpu}
mkdir -p "$out"
python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
python -m benchmarks.kernels --device cuda > "$out/kernels.json" || echo "kernels: see $out/kernels.json"

latency() {
    python -m train latency dmclip_b mamba_small mobileclip_s1 --size 256 --size 512 --size 1024 --batch 1 --batch 256 \
        --repeats 100 --device cuda --precision bf16 --json "$@"
}
latency > "$out/latency-eager.json"
latency --compiled > "$out/latency-compiled.json"
