#!/usr/bin/env bash
# Scores an exported folder with lm_eval. From the repository's root:
#   examples/eval/run.sh FOLDER [lm_eval options]                  seven public tasks, fetched from the Hugging Face hub
#   TASKS=heldout_text,next_line examples/eval/run.sh FOLDER       local text (see make_tasks.py), no network
#   ROUTING=topk examples/eval/run.sh FOLDER                       tokens chosen as in training, one row at a time
#   BATCH=32 examples/eval/run.sh FOLDER
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }
[ $# -ge 1 ] || fail "give an exported folder"
folder=$1 routing=${ROUTING:-causal} tasks=${TASKS:-arc_easy,hellaswag,piqa,winogrande,boolq,openbookqa,tiny_mmlu}
shift
[ -f "$folder/modeling_megadyn.py" ] || fail "$folder: not a folder written by megadyn export (without --as)"
command -v lm_eval >/dev/null || fail "lm_eval is not installed (pip install lm_eval)"
case $routing in
    causal) batch=${BATCH:-8} ;;
    # lm_eval pads without a mask, so top-k would also choose among padding tokens. Causal routing is not affected.
    topk) batch=${BATCH:-1}; [ "$batch" = 1 ] || fail "BATCH = $batch: must be 1 with ROUTING=topk" ;;
    *) fail "ROUTING = $routing: must be causal or topk" ;;
esac
exec lm_eval --model hf --model_args "pretrained=$folder,trust_remote_code=True,routing_mode=$routing" \
    --tasks "$tasks" --include_path "$(dirname "$0")/tasks" --batch_size "$batch" "$@"
