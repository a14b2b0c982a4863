#!/usr/bin/env bash
# Scores an exported folder on LongBench with lm_eval, by generating under causal routing. Fetches it from the Hugging Face hub.
#   examples/eval/longbench.sh FOLDER [lm_eval options]                       the 16 tasks in English and code
#   TASKS=longbench_hotpotqa,longbench_lcc examples/eval/longbench.sh FOLDER  some of them; longbench: all 21, also in Chinese
#   BATCH=8 examples/eval/longbench.sh FOLDER                                 questions at once (default 1)
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }
[ $# -ge 1 ] || fail "give an exported folder"
[ "${ROUTING:-causal}" = causal ] || fail "ROUTING = $ROUTING: must be causal, because LongBench generates"
[ -f "$1/config.json" ] || fail "$1: not a folder written by megadyn export (without --as)"
program=$(command -v lm_eval) || fail "lm_eval is not installed (pip install lm_eval)"
python=$(dirname "$program")/python
[ -x "$python" ] || python=python3
"$python" -c "import jieba, fuzzywuzzy, rouge" 2>/dev/null || fail "LongBench's scores need more packages (pip install 'lm_eval[longbench]')"
length=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["max_position_embeddings"])' "$1/config.json")
echo "prompts of more than $length tokens, less those of the answer, lose their beginning" >&2
TASKS=${TASKS:-longbench_en} BATCH=${BATCH:-1} ROUTING=causal exec "$(dirname "$0")/run.sh" "$@"
