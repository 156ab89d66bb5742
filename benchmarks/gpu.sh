#!/bin/sh
# What only a GPU can say, in one call of about a quarter of an hour; benchmarks/gpu.py says what each step is, and
# docs/results/gpu.md what was seen.
#
#     sh benchmarks/gpu.sh [--small] [FOLDER]      answers as FOLDER/STEP.json (default: gpu), logs beside them
#
# Each step has a process and a limit of its own; one that fails or is stopped does not keep the next from running.
# What is compiled at first use is compiled beforehand, side by side, while the pipeline writes its first store: numbers
# of that round are in FOLDER/first and are disturbed by each other. Needs CUDA's torch; mamba-ssm's source on PYTHONPATH
# is enough for its Triton kernels, which run untuned here: to tune them took over a minute for each type of numbers.
# --small rehearses everything on a CPU, in small, and compiles nothing; its students are timed once.
small= slack=1 device=cuda students="mamba_small:256 mobileclip_s1:256 mamba_mini:256 mobileclip_s0:256 vit_b_16:224"
compiled=$students
if [ "$1" = --small ]; then
    small=--small slack=5 device=cpu students="mamba_tiny:64" compiled= OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1
    export OMP_NUM_THREADS TORCHDYNAMO_DISABLE
    shift
fi
out=${1:-gpu}
mkdir -p "$out/first"
PYTHON=${PYTHON:-python3}
MAMBA_DETERMINISTIC=1 PYTHONUNBUFFERED=1
export MAMBA_DETERMINISTIC PYTHONUNBUFFERED

# limit in seconds, folder, name of the log, step and its arguments
step() {
    limit=$1 folder=$2 log=$3
    shift 3
    start=$(date +%s)
    timeout $((limit * slack)) "$PYTHON" -m benchmarks.gpu "$@" --out "$folder" $small --device $device > "$folder/$log.log" 2>&1
    echo "$folder/$log: exit $?, $(($(date +%s) - start)) s"
}

step 60 "$out" card card
waiting=
[ -n "$small" ] || { step 100 "$out/first" scans scans & waiting="$waiting $!"; }
for student in $compiled; do
    name=${student%:*}
    step 170 "$out/first" "latency-$name" latency "$name" --size "${student#*:}" &
    waiting="$waiting $!"
done
step 170 "$out" run run
for pid in $waiting; do wait "$pid"; done

step 90 "$out" scans scans
step 100 "$out" teachers teachers
step 200 "$out" pipeline pipeline
for student in $students; do
    name=${student%:*}
    step 100 "$out" "latency-$name" latency "$name" --size "${student#*:}"
done
step 150 "$out" training training
step 60 "$out" losses losses
step 200 "$out" captions captions
"$PYTHON" -m benchmarks.gpu table --out "$out"
