#!/usr/bin/env bash
# Trains for two epochs on a CUDA device, then runs every benchmark there, in at most eight minutes, and leaves in a folder
# the run and a JSON file of each benchmark:
#
#     . .venv/bin/activate && benchmarks/gpu.sh FOLDER [PHOTOGRAPHS]
#
# Photographs are those of the tests, few and small, unless a folder of others is given. Files are
# NAME-PRECISION[-compile].json. What fails or runs out of time leaves none; the rest still runs, and the script ends with
# status 1. What matters most comes first.
set -uo pipefail

folder=${1:?usage: benchmarks/gpu.sh FOLDER [PHOTOGRAPHS]}
mkdir -p "$folder" || exit 2
limit=480 failed=()

short=()
for network in teachers.conv teachers.inv student; do
    short+=("$network.recipe.epochs=2" "$network.recipe.warmup_epochs=1" "$network.recipe.evaluations=1")
    [[ $# -gt 1 ]] || short+=("$network.recipe.batch_size=12")
done
timeout "$limit" python -m coadvise fit "${2:-$(dirname "$0")/../tests/photos}" --preset photos --baseline "${short[@]}" \
    engine.device=cuda --out "$folder/fit" || failed+=(fit)

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
bench loader float32 # views of the CPU and of the device, which are float32 whatever the precision
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
