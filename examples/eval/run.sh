#!/usr/bin/env bash
# Scores an exported folder with lm_eval (pip install lm_eval). From the repository's root:
#   examples/eval/run.sh FOLDER [lm_eval options]                      six public tasks, fetched from the Hugging Face hub
#   TASKS=heldout_text,next_line examples/eval/run.sh FOLDER           local text (see make_tasks.py), no network
#   ROUTING=topk examples/eval/run.sh FOLDER                           tokens chosen as in training
set -euo pipefail
[ $# -ge 1 ] || { echo "error: give an exported folder" >&2; exit 2; }
folder=$1 routing=${ROUTING:-causal} tasks=${TASKS:-arc_easy,hellaswag,piqa,winogrande,boolq,openbookqa}
shift
batch=${BATCH:-8}
# lm_eval pads without a mask, and top-k would choose among the padding too. Causal routing never looks at it.
if [ "$routing" = topk ]; then batch=1; fi
exec lm_eval --model hf --model_args "pretrained=$folder,trust_remote_code=True,routing_mode=$routing" \
    --tasks "$tasks" --include_path "$(dirname "$0")/tasks" --batch_size "$batch" "$@"
