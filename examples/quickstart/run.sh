#!/usr/bin/env bash
# From raw text to a trained, exported DTF model, all in runs/quickstart/ of the current folder.
#   TENSOR=2 PIPELINE=1 DATA=1 examples/quickstart/run.sh [key=value ...]
# Finished steps are reused and training resumes, so it is safe to run again.
set -euo pipefail
tensor=${TENSOR:-2} pipeline=${PIPELINE:-1} data=${DATA:-1}
run=runs/quickstart
here=$(dirname "$0")
step() { printf '\n== %s\n' "$*"; }

layout="tensor=$tensor pipeline=$pipeline data=$data"
if [ -f "$run/layout" ] && [ "$(cat "$run/layout")" != "$layout" ]; then
    aside="$run/previous-$(tr ' =' '--' <"$run/layout")"
    step "the layout has changed: moving the earlier run to $aside"
    rm -rf "$aside" && mkdir -p "$aside"
    for part in config.yaml checkpoints metrics.jsonl environment.jsonl tensorboard hf evaluation.json summary.json; do
        if [ -e "$run/$part" ]; then mv "$run/$part" "$aside/"; fi
    done
fi
mkdir -p "$run" && echo "$layout" >"$run/layout"

step "corpus: this machine's Python standard library"
[ -f "$run/corpus/train.jsonl" ] || python "$here/make_corpus.py" "$run/corpus"

step "tokenizer: a byte-level BPE"
[ -d "$run/tokenizer" ] || python -m megadyn tokenizer --input "$run/corpus/train.jsonl" --vocab-size 4096 --output "$run/tokenizer"

step "datasets: .bin/.idx"
for split in train validation; do
    [ -f "$run/data/$split.idx" ] || python -m megadyn preprocess --input "$run/corpus/$split.jsonl" \
        --tokenizer "$run/tokenizer" --output-prefix "$run/data/$split" --append-eod --workers 2
done

step "training: $layout; deepspeed starts first, which takes seconds"
deepspeed --quiet --num_accelerators $((tensor * pipeline * data)) --module megadyn.pretrain "$here/config.yaml" \
    parallel.tensor="$tensor" parallel.pipeline="$pipeline" "$@"

step "export to Hugging Face, evaluation, a sample"
python -m megadyn export --checkpoint "$run" --output "$run/hf" --overwrite
python -m megadyn evaluate --checkpoint "$run/hf" --data "$run/data/validation" --samples 64 --json | tee "$run/evaluation.json"
python -m megadyn generate --model "$run/hf" --prompt "def main(" --max-new-tokens 48 --temperature 0.7
python "$here/summarize.py" "$run" "$run/evaluation.json"
