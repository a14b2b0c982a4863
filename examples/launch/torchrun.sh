#!/usr/bin/env bash
# Trains with torchrun, on this machine or on several by the same command on each:
#   [NNODES=8 MASTER_ADDR=node0] examples/launch/torchrun.sh CONFIG.yaml [key=value ...]
# GPUS          how many of each machine's (default: all; a process for each core where there are none)
# NNODES        machines (default: 1)
# MASTER_ADDR   the one where they meet, as all of them reach it; needed for several
# MASTER_PORT   (default: 29500)
# RUN_ID        the same on all machines, another for each job that meets at the same port (default: megadyn)
# MAX_RESTARTS  how often ranks start again, from the last checkpoint, when one has failed (default: 0)
set -euo pipefail
nodes=${NNODES:-1}
meeting=(--standalone)
if [[ $nodes != 1 ]]; then
    if [[ -z ${MASTER_ADDR:-} ]]; then
        echo "error: MASTER_ADDR is not set: $nodes machines need the name of the one where they meet" >&2
        exit 2
    fi
    meeting=(--rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv_id "${RUN_ID:-megadyn}")
fi
python -m megadyn check "$@" ${GPUS:+--processes $((nodes * GPUS))}
exec torchrun --nnodes "$nodes" --nproc_per_node "${GPUS:-auto}" --max_restarts "${MAX_RESTARTS:-0}" "${meeting[@]}" \
    -m megadyn.pretrain "$@"
