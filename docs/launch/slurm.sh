#!/usr/bin/env bash
# A command of wanjax on nodes with GPUs, one process a node:
#   sbatch docs/launch/slurm.sh train --config configs/train_flf2v_14b_720p.py --workdir /scratch/run ...
#SBATCH --job-name=wanjax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
# SIGTERM comes 300 s before the end: a training saves, and goes on when the job is queued again.
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch $0 COMMAND FLAGS.., such as: sbatch $0 sample --config configs/flf2v_14b_720p.py" >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}
# JAX reads from Slurm how many processes there are, and which this is.
srun --kill-on-bad-exit=1 "${VENV:-.venv}/bin/wanjax" "$@"
