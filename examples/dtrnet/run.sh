#!/usr/bin/env bash
# Trains on all GPUs of the hosts in HOSTFILE (one node without it). From the repository's root:
#   examples/dtrnet/run.sh [CONFIG.yaml] [key=value ...]
set -euo pipefail
config=${1:-examples/dtrnet/bilayer.yaml}
shift || true
exec deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} --module megadyn.pretrain "$config" "$@"
