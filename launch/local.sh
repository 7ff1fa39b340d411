#!/usr/bin/env bash
# Start N processes of a program on this machine. They work as one run.
#
#   launch/local.sh --processes 2 --config configs/run/tiny.yaml data.loader.groups=2
#   PROGRAM=unimoe_jax.evaluate launch/local.sh --processes 2 runs/tiny
#
# With NVIDIA devices each process takes one of them. SIGTERM and Ctrl-C reach all processes, and each
# saves and leaves. If one fails, the others notice it and leave. A process that is still waiting for
# it to join cannot notice; it is killed after GRACE seconds (default: 60). The exit code is 0 if
# every process ended well, else that of the first that failed.
#
# PYTHON names the interpreter (default: python3), PROGRAM the module (default: unimoe_jax.train), and
# PORT the coordinator's port (default: a free one).
set -euo pipefail

if [[ ${1:-} != --processes || ! ${2:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh --processes N ARGUMENTS" >&2
  exit 2
fi
count=$2
shift 2

python=${PYTHON:-python3}
program=${PROGRAM:-unimoe_jax.train}
grace=${GRACE:-60}
if [[ ! $grace =~ ^[0-9]+$ ]]; then
  echo "launch/local.sh: GRACE=$grace: allowed: whole seconds" >&2
  exit 2
fi
gpus=0
cpu=false
# An empty CUDA_VISIBLE_DEVICES hides all devices.
if [[ ${JAX_PLATFORMS:-} == cpu || -z ${CUDA_VISIBLE_DEVICES-all} ]]; then cpu=true; fi
if [[ $cpu == false ]] && found=$(nvidia-smi --list-gpus 2>/dev/null | grep '^GPU '); then
  # JAX numbers the visible devices from 0, so only their number matters.
  gpus=$(tr , '\n' <<<"${CUDA_VISIBLE_DEVICES:-$found}" | wc -l)
  if ((count > gpus)); then
    echo "launch/local.sh: --processes $count: each takes a GPU, and there are $gpus; allowed: 1 to" \
      "$gpus, or any number with JAX_PLATFORMS=cpu" >&2
    exit 2
  fi
fi
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$count

pids=()
trap 'kill -TERM ${pids[@]+"${pids[@]}"} 2>/dev/null || true' TERM INT HUP

# `set -m` puts each process into a separate group. Otherwise Ctrl-C in a terminal would reach it in
# addition to the SIGTERM from here, and a second signal means "end at once, without saving".
set -m
for ((index = 0; index < count; index++)); do
  own=(JAX_PROCESS_ID="$index")
  ((gpus == 0)) || own+=(JAX_LOCAL_DEVICE_IDS="$index")
  env "${own[@]}" "$python" -m "$program" "$@" &
  pids+=("$!")
done
set +m

result=0
while ((${#pids[@]} > 0)); do
  left=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    if ((code != 0 && result == 0)); then
      result=$code
      last=$((SECONDS + grace))
    fi
  done
  pids=(${left[@]+"${left[@]}"})
  if ((result != 0 && ${#pids[@]} > 0 && SECONDS >= last)); then
    echo "launch/local.sh: a process has ended with code $result; ${#pids[@]} that did not leave" \
      "within $grace s are killed" >&2
    for pid in "${pids[@]}"; do
      kill -KILL -- "-$pid" 2>/dev/null || true # The minus also ends the processes that read data.
    done
    last=$((SECONDS + grace))
  fi
  sleep 0.2 || true # Ctrl-C interrupts `sleep`, which must not end this script.
done
exit "$result"
