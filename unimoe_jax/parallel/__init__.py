"""Many devices and many processes. Imports config and runtime.

sharding      the mesh, and logical axes -> mesh axes; the only file that names mesh axes
placement     host arrays, shapes and batches onto a mesh; bytes per device
processes     find the other processes: flags, environment, JobSet, SLURM, TPU pod
distributed   join them, agree on values, let one process write, and end together
"""
