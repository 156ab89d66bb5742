#!/bin/sh
# What only a GPU can say: do the kernels of mamba-ssm agree with their definitions, and how fast are the students.
#
#     sh benchmarks/gpu.sh [FOLDER]        writes kernels.json and latency-*.json there (default: gpu)
#
# Not yet run: it was written on a machine without a GPU. Needs one of 40 GB or more, CUDA's torch, and mamba-ssm built
# with MAMBA_KEEP_CUDA_BUILD=TRUE; without mamba-ssm the plain scans are measured, and the files say so.
set -e
out=${1:-gpu}
mkdir -p "$out"
python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
python -m benchmarks.kernels --device cuda > "$out/kernels.json" || echo "kernels: beyond tolerance, see $out/kernels.json"
for how in eager compiled; do
    python - "$how" > "$out/latency-$how.json" <<'PYTHON'
import dataclasses
import json
import sys

from train.latency import measure, table

names = ["dmclip_b", "mamba_small", "mobileclip_s1"]
rows = measure(names, [256, 512, 1024], [1, 256], 100, "cuda", "bf16", compiled=sys.argv[1] == "compiled")
print(table(rows), file=sys.stderr)
print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
PYTHON
done
