"""Kernels written for one platform. Imports config and parallel.

splash_attention    attention on TPUs by the kernel that comes with jax; when it is worth using
"""
