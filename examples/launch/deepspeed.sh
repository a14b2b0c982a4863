#!/usr/bin/env bash
# Trains with the deepspeed launcher, on this machine or on the hosts of a hostfile:
#   [HOSTFILE=hosts] examples/launch/deepspeed.sh CONFIG.yaml [key=value ...]
# HOSTFILE        one host per line as `name slots=8`, started from here by pdsh and ssh
# NODE_RANK       to avoid ssh: run this on each host of HOSTFILE, with 0, 1, ... in the order of its lines
# GPUS            without HOSTFILE: number of this machine's GPUs to use (default: all)
# MASTER_ADDR     the first host's address, reachable from all hosts (default: its name in HOSTFILE)
# MASTER_PORT     (default: 29500)
# DEEPSPEED_ARGS  further options of the deepspeed command, such as "--bind_cores_to_rank", or "--log_level info" for its own log
# Over ssh the deepspeed command passes on only variables of Python and NCCL. Put others into ~/.deepspeed_env, one
# NAME=value per line.
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network interface between the machines, where each has several.
set -euo pipefail
# Blocks that grow do not cut a GPU's memory into pieces of no use, as micro-batches of different sizes do.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}
options=(--log_level error --master_port "${MASTER_PORT:-29500}")
if [[ -n ${HOSTFILE:-} ]]; then
    by_ssh=(--ssh)
    if [[ -n ${NODE_RANK:-} ]]; then by_ssh=(); fi
    python -m megadyn check "$@" --hostfile "$HOSTFILE" "${by_ssh[@]}"
    first=$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$HOSTFILE")
    options+=(--hostfile "$HOSTFILE" --no_ssh_check --master_addr "${MASTER_ADDR:-$first}")
    if [[ -n ${NODE_RANK:-} ]]; then
        options+=(--no_ssh --node_rank "$NODE_RANK")
    else
        options+=(--force_multi)        # otherwise a single remote host would be mistaken for this one
    fi
else
    python -m megadyn check "$@" ${GPUS:+--processes "$GPUS"}
    options+=(${GPUS:+--num_accelerators "$GPUS"})
fi
# shellcheck disable=SC2086     # DEEPSPEED_ARGS must be split into words
exec deepspeed "${options[@]}" ${DEEPSPEED_ARGS:-} --module megadyn.pretrain "$@"
