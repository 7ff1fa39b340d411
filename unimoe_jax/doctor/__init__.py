"""Checks whether this machine can run the package. Imports config, runtime and parallel at most.

checks         a check: name, result and remedy; the sections of the report
requirements   which packages and versions the metadata of unimoe_jax ask for
probe          a script that imports modules, or asks jax for its devices, in a separate process
probing        runs that script with a timeout, and says which module has ended it
packages       python, required packages, optional parts, and packages that break transformers
devices        backend, devices, and plugins whose devices jax has not found
machine        CPU cores, memory, /dev/shm
folders        whether the cache folder and the run folder can be written, and how full the disk is
printing       the checks as text, in colour on a terminal, or as JSON
__main__       the command line

Broken installations are what this folder is for. So it imports only the standard library when it
starts, and everything else where a failure can be caught.
"""
