#!/usr/bin/env bash
# Runs every benchmark on a CUDA device, in at most ten minutes, and leaves a JSON file of each in a folder:
#
#     . .venv/bin/activate && benchmarks/gpu.sh FOLDER
#
# The files are NAME-PRECISION[-compile].json. A benchmark that fails or runs out of time leaves none; the others still
# run, and the script ends with status 1. What matters most comes first.
set -uo pipefail

folder=${1:?usage: benchmarks/gpu.sh FOLDER}
mkdir -p "$folder" || exit 2
limit=600 failed=()

bench() { # NAME PRECISION [--compile]
    local run="$1-$2${3:+-compile}" left=$((limit - SECONDS))
    printf '\n== %s, %d s left\n' "$run" "$left"
    if ((left <= 0)) || ! timeout "$left" python -m benchmarks "$1" --device cuda --precision "$2" --repeats 5 ${3:+"$3"} \
        --json "$folder/$run.json"; then
        failed+=("$run")
    fi
}

for precision in bfloat16 float32; do
    bench involution "$precision"
done
for precision in bfloat16 float32; do
    bench student "$precision"
    bench step "$precision"
    bench cache "$precision"
done
bench loader float32 # its views are float32 whatever the precision
bench checkpoint float32
bench startup float32
for name in student step; do # compiling takes longest
    for precision in bfloat16 float32; do
        bench "$name" "$precision" --compile
    done
done

if ((${#failed[@]})); then
    echo "not done: ${failed[*]}" >&2
    exit 1
fi
