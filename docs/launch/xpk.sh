#!/usr/bin/env bash
# Runs a command of wanjax on a slice of a GKE cluster by XPK (pip install xpk):
#   docs/launch/xpk.sh CLUSTER v6e-8 gcr.io/PROJECT/wanjax:tpu -- wanjax train --config configs/train_flf2v_14b_720p.py ...
# The image is docs/launch/Dockerfile.tpu's. ZONE, PROJECT and SLICES (1) come from the environment.
set -euo pipefail

if [ $# -lt 5 ] || [ "$4" != "--" ]; then
  echo "usage: [ZONE=..] [PROJECT=..] [SLICES=1] $0 CLUSTER TPU_TYPE IMAGE -- COMMAND.." >&2
  exit 2
fi
cluster=$1 type=$2 image=$3
shift 4
places=()
[ -z "${ZONE:-}" ] || places+=(--zone "$ZONE")
[ -z "${PROJECT:-}" ] || places+=(--project "$PROJECT")

# With several slices only the axis `data` may cross them: --mesh data=SLICES,..
xpk workload create \
  --cluster "$cluster" "${places[@]}" \
  --workload "wanjax-$(date +%m%d-%H%M%S)" \
  --tpu-type "$type" --num-slices "${SLICES:-1}" \
  --docker-image "$image" \
  --command "$(printf '%q ' "$@")"
