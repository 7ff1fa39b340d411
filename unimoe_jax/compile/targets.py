"""Devices that are not here: virtual CPUs, TPU slices and H200 GPUs for their compilers."""

from __future__ import annotations

import os
import re

import jax
from jax.experimental import topologies

from unimoe_jax.config import ConfigError
from unimoe_jax.runtime.cpu import settle_cpu

COUNT = r"[1-9]\d*"
TPU_KINDS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
# A TPU's: what its compiler gives out, as its messages say it. An H200's: three quarters of its
# memory, what JAX reserves at start unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
HBM_GIB = {"v4": 31.25, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75, "h200": 105.75}
# An H200 SXM in the terms of XLA's published GPU descriptions (GpuTargetConfigProto, its h200.txtpb
# among them): 132 multiprocessors of compute capability 9.0, 141 GiB at 4.8 TB/s, 50 MiB of L2.
# Limits per block and multiprocessor are those of the capability in the CUDA programming guide.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 151397597184
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
"""


def target_devices(topology: str) -> list[jax.Device]:
    """The devices of `cpu:N`, `h200:N` or a TPU topology `KIND:SHAPE`; nothing runs on them.

    Raises:
        ConfigError: no such topology, or the compiler for it is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and re.fullmatch(COUNT, shape):
        return _cpu_devices(int(shape))
    if kind == "h200" and re.fullmatch(COUNT, shape):
        return _described(topology, "cuda", f"1x1x{shape}", "gpu", target_config=H200)
    if kind not in TPU_KINDS or not re.fullmatch(rf"{COUNT}(x{COUNT})*", shape):
        raise ConfigError(
            f"--topology {topology}: neither cpu:N nor h200:N nor KIND:SHAPE with KIND of "
            f"{sorted(TPU_KINDS)}, as v5p:2x2x4; all numbers from 1 up"
        )
    return _described(topology, "tpu", topology, "tpu")


def _described(
    name: str, platform: str, topology: str, extra: str, **options: str
) -> list[jax.Device]:
    """Devices that the compiler of `platform` makes of a description; `extra` installs it."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for a TPU in this machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is locked: none is used
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # nor for a GPU's driver
    jax.config.update("jax_platforms", "cpu")
    if platform == "cuda":
        options["topology"] = topology
    try:
        return list(topologies.get_topology_desc(topology, platform, **options).devices)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"--topology {name}: {str(error).splitlines()[0]} (its compiler comes with "
            f"pip install -e '.[{extra}]')"
        ) from error


def _cpu_devices(count: int) -> list[jax.Device]:
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={count}".strip()
    settle_cpu()
    jax.config.update("jax_platforms", "cpu")
    if len(jax.devices()) < count:
        raise ConfigError(f"--topology cpu:{count}: XLA_FLAGS asks for {len(jax.devices())}")
    return jax.devices()[:count]
