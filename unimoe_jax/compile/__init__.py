"""`python -m unimoe_jax.compile`: programs for devices that are not here. Imports stages, generate.

__main__     the command line and its exit codes
targets      descriptions of TPU slices and GPUs to compile for
measure      one program compiled and measured: memory, FLOPs, collectives
decoding     the programs of generation
hlo          what the text of a compiled program does
hlo_memory   what a compiled program keeps in memory
flops        the FLOPs that the model needs, counted on its mathematics
summary      the report as text
"""
