#!/usr/bin/env bash
#SBATCH --job-name=megadyn
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains under Slurm. When you run it, it submits itself; inside an allocation it starts the job there:
#   NODES=8 examples/launch/slurm.sh CONFIG.yaml [key=value ...]
# NODES        number of machines (default: 1)
# GPUS         GPUs per machine (default: 8)
# CPUS         cores per GPU (default: 8)
# MASTER_ADDR  the first machine's address, reachable from all (default: its name)
# MASTER_PORT  (default: derived from the job's number)
# SRUN_ARGS    further options of srun, such as "--container-image=..."
# sbatch reads partition, account and time limit from SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT.
# Ten minutes before the limit all ranks get SIGUSR1: they save and end. Submit the script again to resume the run.
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network interface between the machines, where each has several.
set -euo pipefail
# Blocks that grow do not cut a GPU's memory into pieces of no use, as micro-batches of different sizes do.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}
nodes=${NODES:-1} gpus=${GPUS:-8}
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    python -m megadyn check "$@" --processes $((nodes * gpus))
    exec sbatch --nodes "$nodes" --ntasks-per-node "$gpus" --gpus-per-node "$gpus" --cpus-per-task "${CPUS:-8}" "$0" "$@"
fi
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}} MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
# srun does not use the job's number of cores per task by default.
# shellcheck disable=SC2086     # SRUN_ARGS must be split into words
exec srun --kill-on-bad-exit=1 --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" ${SRUN_ARGS:-} python -m megadyn.pretrain "$@"
