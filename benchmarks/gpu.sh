#!/usr/bin/env bash
# All that needs a GPU, in one command: every benchmark, each as a dated table with its command, and tests of what runs on one.
#   benchmarks/gpu.sh [NAME ...]          one GPU of 140 GB (3B and 7B shapes), from the repository's root; NAME: a table, or all
#   FOLDER=DIR benchmarks/gpu.sh          where the tables go, instead of benchmarks
#   TRIAL=1 FOLDER=DIR benchmarks/gpu.sh  the same commands with tiny shapes on a CPU, to see that they run: no figures
# Each table is one file. A table that has a file of today is left as it is, so the same call again goes on where it stopped. A call
# leaves 8 files at most, also if it is cut off. What a failing command says is in NAME.failed.txt until it succeeds; the others go on.
# Exit status: 0 if all tables asked for are there, 1 if one failed, 2 if a name is wrong, a trial has no folder or no GPU is there,
# 3 if some are left for the next call.
set -uo pipefail
folder=${FOLDER:-benchmarks}
day=$(date +%F)
most=7 made=0 failed=0 left=0
names="kernels bytes step-3b step-3b-torch layer layer-torch step step-8k step-7b tests checkpoint scaling"
for name in "$@"; do
    case " $names " in
        *" $name "*) ;;
        *) echo "error: no table $name; there are: $names" >&2; exit 2 ;;
    esac
done
asked=" ${*:-$names} "
[ -z "${TRIAL:-}" ] || [ -n "${FOLDER:-}" ] || {
    echo "error: TRIAL=1 needs FOLDER=DIR, because its tables must not stand among those with figures" >&2; exit 2; }

if [ -n "${TRIAL:-}" ]; then
    export DS_ACCELERATOR=cpu
    small="--hidden 32 --layers 4 --heads 4 --kv-heads 2 --ffn 64 --vocab 97 --rounds 1 --warmup 1 --precision bf16 --device cpu"
    study="$small --sequence 64" study_long="$study" three="$study" seven="$study" save="$study" scale="$study"
    peak="--peak-tflops 1"   # measuring it takes minutes on a CPU without bf16 instructions
    count="--hidden 32 --layers 4 --heads 4 --kv-heads 2 --ffn 64 --vocab 97 --batch 1 --sequence 64"
    tests="tests/routing/test_select.py"
else
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "error: no CUDA device; TRIAL=1 FOLDER=DIR benchmarks/gpu.sh tries the commands on a CPU" >&2; exit 2; }
    on="--precision bf16 --device cuda"
    few="--rounds 7 --warmup 3 $on" many="--rounds 20 --warmup 5 $on"
    study="--hidden 1024 --layers 8 --heads 16 --kv-heads 4 --ffn 2816 --vocab 8192 --batch 8 --sequence 2048 $many"
    study_long="--hidden 1024 --layers 8 --heads 16 --kv-heads 4 --ffn 2816 --vocab 8192 --batch 2 --sequence 8192 $many"
    three="--hidden 2048 --layers 36 --heads 16 --kv-heads 2 --ffn 11008 --vocab 151936 --batch 2 --sequence 4096 $few"
    seven="--hidden 3584 --layers 28 --heads 28 --kv-heads 4 --ffn 18944 --vocab 152064 --batch 1 --sequence 4096 $few"
    save="--hidden 1024 --layers 24 --heads 16 --kv-heads 4 --ffn 2816 --vocab 32000 --batch 4 --sequence 2048 $on"
    scale="--hidden 2048 --layers 8 --heads 16 --kv-heads 4 --ffn 5632 --vocab 32000 --sequence 4096 --global-batch 16 $on"
    tests="tests/model tests/routing" peak="" count=""
fi
mkdir -p "$folder"

table() {   # NAME TITLE COMMAND...: what the command prints, under its title and itself
    local name=$1 title=$2 file="$folder/$day-gpu-$1.md"
    shift 2
    case "$asked" in *" $name "*) ;; *) return ;; esac
    [ -e "$file" ] && { echo "$file is there"; return; }
    [ $made -ge $most ] && { left=1; return; }
    made=$((made + 1))
    echo "$file: $*"
    printf '# %s, %s\n\n    %s\n\n' "$title" "$day" "$*" >"$file.part"
    if "$@" >>"$file.part" 2>"$file.log"; then
        mv "$file.part" "$file"
        rm -f "$file.log" "$folder/$day-gpu-$name.failed.txt"
    else
        failed=1
        cat "$file.part" "$file.log" >"$folder/$day-gpu-$name.failed.txt"
        tail -n 1 "$file.log" >&2
        rm -f "$file.part" "$file.log"
    fi
}

# The options are words: they are meant to be split. What is missed most comes first.
# shellcheck disable=SC2086
{
table kernels "Kernels against float64" python -m pytest -q -p no:cacheprovider tests/kernels
table bytes "Bytes and operations of a training step" python tools/benchmark.py bytes --models dense mod:0.125 dtf:0.25 dtrnet $count
table step-3b "A training step of 3B models" python tools/benchmark.py step --models dense dtf:0.25 mod:0.125 $peak $three
table step-3b-torch "A training step of 3B models without Triton" \
    python tools/benchmark.py step --models dense dtf:0.25 mod:0.125 --kernels torch $peak $three
table layer "Layers of 3B models" python tools/benchmark.py layer $three --layers 2
table layer-torch "Layers of 3B models without Triton" python tools/benchmark.py layer --kernels torch $three --layers 2
table step "A training step" python tools/benchmark.py step $peak $study
table step-8k "A training step on long sequences" python tools/benchmark.py step --models dense dtrnet:0.1 $peak $study_long
table step-7b "A training step of a 7B DTF model" \
    python tools/benchmark.py step --models dtf:0.25 --recompute full --unchecked $peak $seven
table tests "Tests of what runs on a GPU" python -m pytest -q -p no:cacheprovider $tests
table checkpoint "Checkpoints" python tools/benchmark.py checkpoint $save
table scaling "Processes" python tools/benchmark.py scaling $scale
}
[ $left -ne 0 ] && echo "$most tables are made: call again for the rest"
[ $failed -ne 0 ] && exit 1
[ $left -eq 0 ] || exit 3
