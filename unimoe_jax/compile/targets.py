"""Devices that are not here, for which programs can be compiled all the same.

Virtual CPUs are made by XLA in this process. TPU slices and H200 GPUs are descriptions that their
compilers accept in place of the devices; no program can run on them.
"""

from __future__ import annotations

import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from unimoe_jax.config import ConfigError
from unimoe_jax.runtime.cpu import settle_cpu

COUNT = r"[1-9]\d*"
"""A whole number from 1 up."""
TPU_KINDS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
HBM_GIB = {"v4": 31.25, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75, "h200": 105.75}
"""Memory per device that programs can use, in GiB.

TPUs: the limit that their compiler names in its messages. H200: three quarters of its memory, which
JAX reserves at start unless XLA_PYTHON_CLIENT_MEM_FRACTION sets another share.
"""

# An H200 SXM, in the format of XLA's published GPU descriptions (GpuTargetConfigProto, of which
# h200.txtpb is one): 132 multiprocessors of compute capability 9.0, 141 GiB at 4.8 TB/s, 50 MiB of
# L2 cache. The limits per block and multiprocessor are those that the CUDA programming guide gives
# for this compute capability.
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


def target_devices(topology: str) -> list[Any]:
    """The `jax.Device`s of `cpu:N`, `h200:N` or a TPU topology `KIND:SHAPE`, such as v5p:2x2x4.

    Raises:
        ConfigError: there is no such topology, or its compiler is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and re.fullmatch(COUNT, shape):
        return _cpu_devices(int(shape))
    if kind == "h200" and re.fullmatch(COUNT, shape):
        options = {"topology": f"1x1x{shape}", "target_config": H200}
        return _described_devices(topology, "cuda", options["topology"], "gpu", options)
    if kind not in TPU_KINDS or not re.fullmatch(rf"{COUNT}(x{COUNT})*", shape):
        raise ConfigError(
            f"--topology {topology}: neither cpu:N nor h200:N nor KIND:SHAPE with KIND of "
            f"{sorted(TPU_KINDS)}, as v5p:2x2x4; all numbers from 1 up"
        )
    return _described_devices(topology, "tpu", topology, "tpu", {})


def _described_devices(
    name: str, platform: str, topology: str, extra: str, options: dict[str, str]
) -> list[Any]:
    """Devices that the compiler of a platform makes from a description.

    name: the topology as the user wrote it. topology, options: arguments of the compiler. extra:
    the optional dependency that installs the compiler.
    """
    # Look for no TPU in this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Several processes may compile at the same time, because none of them uses a TPU.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Look for no driver of a GPU.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(topology, platform, **options).devices)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"--topology {name}: {str(error).splitlines()[0]} (its compiler comes with "
            f"pip install -e '.[{extra}]')"
        ) from error


def _cpu_devices(count: int) -> list[Any]:
    """Virtual CPU devices. XLA makes them when JAX starts, so nothing may have used JAX before."""
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={count}".strip()
    settle_cpu()
    jax.config.update("jax_platforms", "cpu")
    available = len(jax.devices())
    if available < count:
        raise ConfigError(
            f"--topology cpu:{count}: XLA_FLAGS asks for {available}; remove {flag} from it"
        )
    return jax.devices()[:count]
