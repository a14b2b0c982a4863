#!/usr/bin/env bash
# Trains with torchrun, on this machine, or on several if you run the same command on each:
#   [NNODES=8 MASTER_ADDR=node0] examples/launch/torchrun.sh CONFIG.yaml [key=value ...]
# GPUS          number of GPUs to use per machine (default: all; without GPUs one process per core)
# NNODES        number of machines (default: 1)
# MASTER_ADDR   address of the machine where they meet, reachable from all; needed for several machines
# MASTER_PORT   (default: 29500)
# RUN_ID        equal on all machines, but different for each job that meets at the same port (default: megadyn)
# MAX_RESTARTS  how often to restart all ranks from the last checkpoint after a failure (default: 0)
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network interface between the machines, where each has several.
set -euo pipefail
# Blocks that grow do not cut a GPU's memory into pieces of no use, as micro-batches of different sizes do.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}
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
