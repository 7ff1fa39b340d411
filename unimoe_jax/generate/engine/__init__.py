"""Prompts of token ids and soft tokens in, generated token ids out, many prompts side by side.

The engine knows no text, no files and no command line: its caller turns requests into `Sequence`s
and tokens into answers. Imports models, nn, parallel and generate/errors.py.

settings           `Sampling` of a request, and the same checked and complete
sequence           one prompt, its settings, and the tokens generated for it so far
buckets            the few sizes to which prompts, caches and groups of prompts are rounded up
sampling           logits -> the next token of every row
state              caches and counters of the rows; the functions that insert, grow and advance
program_cache      functions compiled ahead of time, each once; arrays placed on the mesh
decoding_programs  the four programs of one model: prefill, insert, grow, advance
active_batch       the rows: sequences enter, are decoded side by side, and leave
engine             the loop that fills free rows, and the list of programs to compile beforehand
"""
