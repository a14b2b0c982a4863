#!/usr/bin/env bash
# Trains with Open MPI's mpirun, on this machine or on the hosts of a hostfile:
#   GPUS=8 examples/launch/mpi.sh CONFIG.yaml [key=value ...]
#   HOSTFILE=hosts examples/launch/mpi.sh CONFIG.yaml [key=value ...]
# HOSTFILE     one host per line as `name slots=8`
# GPUS         without HOSTFILE: number of this machine's GPUs to use
# MASTER_ADDR  the first host's address, reachable from all hosts (default: its name in HOSTFILE)
# MASTER_PORT  (default: 29500)
# MPIRUN_ARGS  further options of mpirun, such as "--mca btl_tcp_if_include eth0"
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network interface between the machines, where each has several.
set -euo pipefail
# Blocks that grow do not cut a GPU's memory into pieces of no use, as micro-batches of different sizes do.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}
if [[ -n ${HOSTFILE:-} ]]; then
    python -m megadyn check "$@" --hostfile "$HOSTFILE"
    first=$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$HOSTFILE")
    options=(--hostfile "$HOSTFILE")                            # one process per slot
elif [[ -n ${GPUS:-} ]]; then
    python -m megadyn check "$@" --processes "$GPUS"
    first=127.0.0.1
    options=(-n "$GPUS" --host "localhost:$GPUS")
else
    echo "error: neither HOSTFILE nor GPUS is set: mpirun needs to know where and how many to start" >&2
    exit 2
fi
names='(CUDA|DS|FI|GLOO|HF|MASTER|MEGADYN|MKL|NCCL|OMP|PYTORCH|TORCH|TRITON|UCX|WANDB)_.*'      # passed to the other hosts
export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT=${MASTER_PORT:-29500}
for name in $(compgen -e | grep -E "^((|LD_LIBRARY_|PYTHON)PATH|$names)$"); do
    options+=(-x "$name")
done
# By default mpirun binds each rank to one core, so it could not use threads. By slot, neighbouring ranks share a host.
# shellcheck disable=SC2086     # MPIRUN_ARGS must be split into words
exec mpirun --bind-to none --map-by slot "${options[@]}" ${MPIRUN_ARGS:-} python -m megadyn.pretrain "$@"
