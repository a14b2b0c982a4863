#!/usr/bin/env bash
# Trains the example in this script's folder:
#   examples/dtf_3b/run.sh [VARIANT.yaml] [key=value ...]
# VARIANT.yaml  another configuration in the folder (default: config.yaml)
# LAUNCHER      deepspeed (default), torchrun, mpi or slurm: the script in examples/launch/ to use, with its settings
set -euo pipefail
folder=$(dirname "$0")
config=config.yaml
if [[ ${1:-} == *.yaml ]]; then
    config=$1
    shift
fi
exec "$folder/../launch/${LAUNCHER:-deepspeed}.sh" "$folder/$config" "$@"
