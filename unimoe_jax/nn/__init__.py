"""Layers that every model family shares. Imports config and parallel.

linear       a linear layer with its adapter, the same for experts, row dropout
norm, mlp    RMSNorm and LayerNorm; the dense feed-forward layers SwiGLU and Mlp
stack        scans over layers, and where a layer is stored in a stack
head         logits, or the loss of a batch without its logits
attention/   softmax attention: the reference, packed rows, decoding, rotary positions
moe/         the mixture-of-experts layer: router, experts, dispatch, exchange between devices
kernels/     kernels written for one platform, and the rules for using them

Mathematics is in pure functions; parameters are declared in linen modules.
"""
