#!/usr/bin/env bash
# Run on all workers of a Cloud TPU pod slice, which must exist already:
#
#   launch/tpu_pod.sh --tpu NAME --zone ZONE -- \
#     --config configs/run/unimoe_8e.yaml output=/mnt/runs/unimoe_8e data.cache=/mnt/cache
#
#   launch/tpu_pod.sh --tpu NAME --zone ZONE --install      copies the package; do this first
#   launch/tpu_pod.sh --tpu NAME --zone ZONE --stop         sends SIGTERM: all save and leave
#
# `output` and `data.cache` must be on a disk that all workers share (a mounted bucket or Filestore),
# because all of them write checkpoints. A program that was compiled once serves the next start.
set -euo pipefail

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

tpu='' zone='' action=run
while (($# > 0)); do
  case $1 in
    --tpu | --zone)
      (($# > 1)) || usage # The value is missing.
      if [[ $1 == --tpu ]]; then tpu=$2; else zone=$2; fi
      shift 2
      ;;
    --install | --stop) action=${1#--} && shift ;;
    --) shift && break ;;
    *) usage ;;
  esac
done
[[ -n $tpu && -n $zone ]] || usage

everywhere() {
  gcloud compute tpus tpu-vm ssh "$tpu" --zone "$zone" --worker all --command "$1"
}

case $action in
  install)
    here=$(cd "$(dirname "$0")/.." && pwd)
    archive=$(mktemp --suffix .tar.gz)
    trap 'rm -f "$archive"' EXIT
    git -C "$here" archive --format tar.gz --output "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$tpu:unimoe_jax.tar.gz" --zone "$zone" --worker all
    everywhere 'mkdir -p unimoe_jax && tar -xzf unimoe_jax.tar.gz -C unimoe_jax && cd unimoe_jax &&
      python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e ".[tpu]"'
    ;;
  stop)
    # The process number in .pid may be left from an earlier run and belong to another program now,
    # so look at the command line of the process before sending a signal.
    # shellcheck disable=SC2016 # The shells of the workers expand the variables.
    everywhere 'pid=$(cat unimoe_jax/.pid) && grep -qsa unimoe_jax "/proc/$pid/cmdline" &&
      kill -TERM "$pid" || echo "$HOSTNAME: no run here" >&2'
    ;;
  run)
    (($# > 0)) || usage
    arguments=$(printf '%q ' "$@")
    # `exec` replaces the shell by Python, which so keeps the number that was written for --stop.
    everywhere "cd unimoe_jax && echo \$\$ > .pid && PYTHONUNBUFFERED=1 exec .venv/bin/python -m \
      ${PROGRAM:-unimoe_jax.train} --cluster tpu $arguments"
    ;;
esac
