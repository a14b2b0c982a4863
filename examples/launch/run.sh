#!/usr/bin/env bash
# Trains the example in whose folder it stands:
#   examples/dtf_3b/run.sh [VARIANT.yaml] [key=value ...]
# VARIANT.yaml  another configuration of the folder (default: config.yaml)
# LAUNCHER      deepspeed (default), torchrun, mpi or slurm: the script beside the original of this one, with its settings
set -euo pipefail
folder=$(dirname "$0")
config=config.yaml
if [[ ${1:-} == *.yaml ]]; then
    config=$1
    shift
fi
exec "$folder/../launch/${LAUNCHER:-deepspeed}.sh" "$folder/$config" "$@"
