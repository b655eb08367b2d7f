#!/usr/bin/env bash
# Runs a command of wanjax on every host of a TPU slice, from a laptop with gcloud:
#   docs/launch/tpu_vm.sh NAME ZONE -- wanjax sample --config configs/flf2v_14b_720p.py --checkpoint /mnt/disk/FLF2V ...
# NAME is there, or is made of TYPE (v6e-8) and VERSION. The clone's files are copied; what was installed stays.
# DELETE=1 gives the slice back behind it.
set -euo pipefail

if [ $# -lt 4 ] || [ "$3" != "--" ]; then
  echo "usage: [TYPE=v6e-8] [VERSION=v2-alpha-tpuv6e] [DELETE=1] $0 NAME ZONE -- COMMAND.." >&2
  exit 2
fi
name=$1 zone=$2
shift 3
type=${TYPE:-v6e-8} version=${VERSION:-v2-alpha-tpuv6e}
root=$(cd "$(dirname "$0")/../.." && pwd)

tpu() { gcloud compute tpus tpu-vm "$@" --zone "$zone"; }

if ! tpu describe "$name" >/dev/null 2>&1; then
  tpu create "$name" --accelerator-type "$type" --version "$version"
fi
if [ "${DELETE:-0}" = 1 ]; then
  trap 'tpu delete "$name" --quiet' EXIT
fi

archive=$(mktemp -t wanjax-XXXXXX.tar.gz)
git -C "$root" archive --format tar.gz --output "$archive" HEAD
tpu scp "$archive" "$name:wanjax.tar.gz" --worker all
rm "$archive"

# Hosts of a slice find one another; the first prints and writes.
words=$(printf '%q ' "$@")
tpu ssh "$name" --worker all --command "
  set -e
  mkdir -p wanjax && tar -xzf wanjax.tar.gz -C wanjax && cd wanjax
  test -x .venv/bin/python || python3 -m venv .venv
  .venv/bin/python -m pip install --quiet '.[tpu]'
  PATH=\$PWD/.venv/bin:\$PATH $words"
