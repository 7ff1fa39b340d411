"""Parameters as flat dictionaries {path: array}. Imports nn, parallel and config.

paths         nested dicts <-> {path: array}; the first rule that matches a path
table         how a stage treats every parameter: trained or frozen, dtype, learning rate
lora          which parameters are adapters, and how they are merged into their kernels
layer_parts   one layer's part of a parameter, however layers are stacked
"""
