"""`python -m unimoe_jax.compile`: programs for devices that are not here. Imports stages, generate.

__main__     the command line and its exit codes
targets      virtual CPUs, TPU slices and GPUs that the compilers know without the devices
measure      one program compiled and measured: memory, FLOPs, collectives
decoding     the programs of generation
hlo_text     the text of a compiled program -> its computations and instructions
hlo          the same text -> FLOPs and collectives
hlo_memory   the same text -> bytes that the forward pass keeps for the backward pass
flops        the FLOPs that the model needs, counted on its mathematics
summary      the report as text, and whether the program fits
"""
