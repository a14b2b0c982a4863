#!/usr/bin/env bash
# All that needs a GPU, in one command: every benchmark, each as a dated table with its command, and tests of what runs on one.
#   benchmarks/gpu.sh [NAME ...]          one GPU of 80 GB or more, from the repository's root; NAME: a table, or all
#   FOLDER=DIR benchmarks/gpu.sh          where the tables go, instead of benchmarks
#   TRIAL=1 FOLDER=DIR benchmarks/gpu.sh  the same commands with tiny shapes on a CPU, to see that they run: no figures
# Each table is one file. A table that has a file of today is left as it is, so the same call again goes on where it stopped. A call
# leaves 8 files at most, also if it is cut off. A table that takes longer than 8 minutes has failed. What a failing command says is in NAME.failed.txt until it succeeds; the others go on.
# Exit status: 0 if all tables asked for are there, 1 if one failed, 2 if a name is wrong, a trial has no folder, or a package or a GPU
# is missing, 3 if some are left for the next call.
set -uo pipefail
folder=${FOLDER:-benchmarks}
day=$(date +%F)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"   # the package of this checkout, which need not be installed
# A host may lack plug-ins that the configuration of the tests speaks of.
pytest="python -m pytest -q -p no:cacheprovider -W ignore::pytest.PytestConfigWarning"
most=7 made=0 failed=0 left=0 seconds=480
names="kernels step-3b step-3b-dtf engine step step-8k generate"
names="$names checkpoint engine-7b step-3b-torch layer layer-torch bytes step-7b tests scaling"
for name in "$@"; do
    case " $names " in
        *" $name "*) ;;
        *) echo "error: no table $name; there are: $names" >&2; exit 2 ;;
    esac
done
asked=" ${*:-$names} "
[ -z "${TRIAL:-}" ] || [ -n "${FOLDER:-}" ] || {
    echo "error: TRIAL=1 needs FOLDER=DIR, because its tables must not stand among those with figures" >&2; exit 2; }

# With what the first five require: what `pip install --no-deps` must bring. Triton's kernels run on GPUs only.
packages="torch transformers pytest numpy safetensors deepspeed einops hjson msgpack psutil"
packages="$packages pydantic pydantic_core annotated_types typing_inspection omegaconf orjson"
[ -n "${TRIAL:-}" ] || packages="$packages triton"
# shellcheck disable=SC2086
python -c 'import sys
from importlib.util import find_spec
lacks = [name for name in sys.argv[1:] if find_spec(name) is None]
sys.exit("error: this Python lacks {}; benchmarks/GPU.md says how to install them".format(", ".join(lacks)) if lacks else 0)' $packages >/dev/null || exit 2

if [ -n "${TRIAL:-}" ]; then
    export DS_ACCELERATOR=cpu
    card="a CPU, with tiny shapes: no figures"
    sizes="--hidden 32 --layers 4 --heads 4 --kv-heads 2 --ffn 64 --vocab 97"
    small="$sizes --rounds 1 --warmup 1 --precision bf16 --device cpu"
    study="$small --sequence 64" study_long="$study" three="$study" seven="$study" save="$study"
    scale="$study --layouts 1x1x2"
    run="--models mod:0.125 $sizes --vocab 300 --sequence 64 --micro-batches 2 --steps 1 --rounds 1 --precision bf16 --device cpu"
    run_offload="$run"
    serve="$small --context 48 --steps 4 --batch 2"
    peak="--peak-tflops 1"   # measuring it takes minutes on a CPU without bf16 instructions
    count="$sizes --batch 1 --sequence 64"
    exact="tests/kernels/test_rule.py" tests="tests/routing/test_select.py"
else
    card=$(python -c 'import torch; p = torch.cuda.get_device_properties(0)
print(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, torch {torch.__version__}")' 2>/dev/null) || {
        echo "error: no CUDA device; TRIAL=1 FOLDER=DIR benchmarks/gpu.sh tries the commands on a CPU" >&2; exit 2; }
    on="--precision bf16 --device cuda"
    few="--rounds 7 --warmup 3 $on" many="--rounds 20 --warmup 5 $on"
    wide="--hidden 2048 --layers 36 --heads 16 --kv-heads 2 --ffn 11008 --vocab 151936"
    study="--hidden 1024 --layers 8 --heads 16 --kv-heads 4 --ffn 2816 --vocab 8192"
    serve="$study --context 2048 8192 --batch 1 8 --steps 64 --rounds 5 $on"
    study_long="$study --batch 2 --sequence 8192 $many"
    study="$study --batch 8 --sequence 2048 $many"
    three="$wide --batch 2 --sequence 4096 $few"
    seven="--hidden 3584 --layers 28 --heads 28 --kv-heads 4 --ffn 18944 --vocab 152064 --batch 1 --sequence 4096 $few"
    run="--models dense dtf:0.25 mod:0.125 $wide --batch 1 --sequence 4096 --micro-batches 8 --steps 5 --rounds 3 $on"
    # Half of a 7B model's layers: a host of 128 GiB holds no more of it.
    run_offload="--models dtf:0.25 ${seven%% --batch*} --layers 14 --recompute full --batch 4 --sequence 4096 --micro-batches 4"
    run_offload="$run_offload --steps 2 --rounds 2 $on"
    save="--hidden 1024 --layers 24 --heads 16 --kv-heads 4 --ffn 2816 --vocab 32000 --batch 4 --sequence 2048 $on"
    scale="--hidden 2048 --layers 8 --heads 16 --kv-heads 4 --ffn 5632 --vocab 32000 --sequence 4096 --global-batch 16 $on"
    exact="tests/kernels tests/model/test_attention.py" tests="tests/model tests/routing" peak="" count=""
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
    printf '# %s, %s\n\nOn %s.\n\n    %s\n\n' "$title" "$day" "$card" "$*" >"$file.part"
    if timeout -k 10 $seconds "$@" >>"$file.part" 2>"$file.log"; then
        mv "$file.part" "$file"
        rm -f "$file.log" "$folder/$day-gpu-$name.failed.txt"
    else
        case $? in 124|137) echo "error: table $name took longer than $seconds s" >>"$file.log" ;; esac
        failed=1
        cat "$file.part" "$file.log" >"$folder/$day-gpu-$name.failed.txt"
        tail -n 1 "$file.log" >&2
        rm -f "$file.part" "$file.log"
    fi
}

# The options are words: they are meant to be split. What is missed most comes first.
# shellcheck disable=SC2086
{
# Models of 3B take turns two at a time and unchecked, so that 80 GB are enough; the tables step and step-8k are held to float64.
table kernels "Kernels and attention against float64" $pytest $exact
table step-3b "A training step of 3B models" \
    python tools/benchmark.py step --models dense mod:0.125 --unchecked $peak $three
table step-3b-dtf "A training step of 3B models" \
    python tools/benchmark.py step --models dense dtf:0.25 --unchecked $peak $three
table engine "Runs of 3B models under ZeRO-1" python tools/benchmark.py engine $run
table step "A training step" python tools/benchmark.py step $peak $study
table step-8k "A training step on long sequences" \
    python tools/benchmark.py step --models dense dtrnet:0.1 $peak $study_long
table generate "Generation" python tools/benchmark.py generate $serve
table checkpoint "Checkpoints" python tools/benchmark.py checkpoint $save
table engine-7b "A run of 7B layers under ZeRO-3 with offloading" \
    python tools/benchmark.py engine --deepspeed-config zero3_offload $run_offload
table step-3b-torch "A training step of a 3B model without Triton" \
    python tools/benchmark.py step --models dense --unchecked --kernels torch $peak $three
table layer "Layers of 3B models" python tools/benchmark.py layer $three --layers 2
table layer-torch "Layers of 3B models without Triton" \
    python tools/benchmark.py layer --kernels torch $three --layers 2
table bytes "Bytes and operations of a training step" \
    python tools/benchmark.py bytes --models dense mod:0.125 dtf:0.25 dtrnet $count
table step-7b "A training step of a 7B DTF model" \
    python tools/benchmark.py step --models dtf:0.25 --recompute full --unchecked $peak $seven
table tests "Tests of what runs on a GPU" $pytest $tests
table scaling "Processes" python tools/benchmark.py scaling $scale
}
[ $left -ne 0 ] && echo "$most tables are made: call again for the rest"
[ $failed -ne 0 ] && exit 1
[ $left -eq 0 ] || exit 3
