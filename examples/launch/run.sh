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
if [[ ! -f $folder/$config ]]; then
    echo "error: $folder/$config: no such file; there are $(cd "$folder" && echo *.yaml)" >&2
    exit 2
fi
exec "$folder/../launch/${LAUNCHER:-deepspeed}.sh" "$folder/$config" "$@"
