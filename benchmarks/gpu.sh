#!/usr/bin/env bash
# All that needs a GPU, in one command: tests of what runs on one, then every benchmark, each as a dated table with its command.
#   benchmarks/gpu.sh [FOLDER]            one GPU of 140 GB (3B and 7B shapes), from the repository's root; FOLDER: benchmarks
#   TRIAL=1 benchmarks/gpu.sh FOLDER      the same commands with tiny shapes on a CPU, to see that they run: no figures
# A benchmark that fails leaves its message in place of its table, the others go on, and the exit status is 1.
set -uo pipefail
folder=${1:-benchmarks}
day=$(date +%F)
failed=0

if [ -n "${TRIAL:-}" ]; then
    export DS_ACCELERATOR=cpu
    small="--hidden 32 --layers 4 --heads 4 --kv-heads 2 --ffn 64 --vocab 97 --rounds 1 --warmup 1 --precision bf16 --device cpu"
    study="$small --sequence 64" study_long="$study" three="$study" seven="$study" save="$study" scale="$study"
    peak="--peak-tflops 1"   # measuring it takes minutes on a CPU without bf16 instructions
    tests="tests/kernels"
else
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "error: no CUDA device; TRIAL=1 benchmarks/gpu.sh FOLDER tries the commands on a CPU" >&2; exit 2; }
    on="--precision bf16 --device cuda"
    few="--rounds 7 --warmup 3 $on" many="--rounds 20 --warmup 5 $on"
    study="--hidden 1024 --layers 8 --heads 16 --kv-heads 4 --ffn 2816 --vocab 8192 --batch 8 --sequence 2048 $many"
    study_long="--hidden 1024 --layers 8 --heads 16 --kv-heads 4 --ffn 2816 --vocab 8192 --batch 2 --sequence 8192 $many"
    three="--hidden 2048 --layers 36 --heads 16 --kv-heads 2 --ffn 11008 --vocab 151936 --batch 2 --sequence 4096 $few"
    seven="--hidden 3584 --layers 28 --heads 28 --kv-heads 4 --ffn 18944 --vocab 152064 --batch 1 --sequence 4096 $few"
    save="--hidden 1024 --layers 24 --heads 16 --kv-heads 4 --ffn 2816 --vocab 32000 --batch 4 --sequence 2048 $on"
    scale="--hidden 2048 --layers 8 --heads 16 --kv-heads 4 --ffn 5632 --vocab 32000 --sequence 4096 --global-batch 16 $on"
    tests="tests/kernels tests/model tests/routing" peak=""
fi
mkdir -p "$folder"

table() {   # NAME TITLE COMMAND...: what the command prints, under its title and itself
    local file="$folder/$day-gpu-$1.md" title=$2 status
    shift 2
    printf '# %s, %s\n\n    %s\n\n' "$title" "$day" "$*" >"$file"
    echo "$file: $*"
    "$@" >>"$file" 2>"$file.log"
    status=$?
    if [ $status -ne 0 ]; then
        failed=1
        tail -n 1 "$file.log" | tee -a "$file" >&2
    else
        rm -f "$file.log"
    fi
}

# The options are words: they are meant to be split.
# shellcheck disable=SC2086
{
table tests "Tests of what runs on a GPU" python -m pytest -q -p no:cacheprovider $tests
table step "A training step" python tools/benchmark.py step $peak $study
table step-8k "A training step on long sequences" python tools/benchmark.py step --models dense dtrnet:0.1 $peak $study_long
table step-3b "A training step of 3B models" python tools/benchmark.py step --models dense dtf:0.25 mod:0.125 $peak $three
table step-3b-torch "A training step of 3B models without Triton" \
    python tools/benchmark.py step --models dense dtf:0.25 mod:0.125 --kernels torch $peak $three
table step-7b "A training step of a 7B DTF model" \
    python tools/benchmark.py step --models dtf:0.25 --recompute full --unchecked $peak $seven
table layer "Layers of 3B models" python tools/benchmark.py layer $three --layers 2
table layer-torch "Layers of 3B models without Triton" python tools/benchmark.py layer --kernels torch $three --layers 2
table checkpoint "Checkpoints" python tools/benchmark.py checkpoint $save
table scaling "Processes" python tools/benchmark.py scaling $scale
}
exit $failed
