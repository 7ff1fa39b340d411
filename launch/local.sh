#!/usr/bin/env bash
# Start N processes of a program on this machine; they work as one run.
#
#   launch/local.sh --processes 2 --config configs/run/tiny.yaml data.loader.groups=2
#   PROGRAM=unimoe_jax.evaluate launch/local.sh --processes 2 runs/tiny
#
# With NVIDIA devices each process takes one of them. SIGTERM and Ctrl-C reach all processes; each
# saves and leaves. The exit code is 0 if every process ended well, else that of the first that did
# not. PYTHON names the interpreter, PORT the coordinator's port (default: a free one).
set -euo pipefail

if [[ ${1:-} != --processes || ! ${2:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh --processes N ARGUMENTS" >&2
  exit 2
fi
count=$2
shift 2

python=${PYTHON:-python3}
program=${PROGRAM:-unimoe_jax.train}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$count

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

for ((index = 0; index < count; index++)); do
  own=(JAX_PROCESS_ID="$index")
  if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; then
    own+=(JAX_LOCAL_DEVICE_IDS="$index")
  fi
  env "${own[@]}" "$python" -m "$program" "$@" &
  pids+=("$!")
done

result=0
for pid in "${pids[@]}"; do
  code=0
  # A trapped signal ends `wait` before the process has ended.
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid" && code=0 || code=$?
  done
  wait "$pid" 2>/dev/null && code=0 || code=$((code ? code : $?))
  ((result != 0)) || result=$code
done
exit "$result"
