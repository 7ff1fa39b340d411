"""The sparse mixture-of-experts layer. Imports nn.linear, config and parallel.

layer       the module: router, experts, dispatch and statistics together
router      pure functions: which experts a token goes to, with which weights; router losses
experts     the forms of an expert: its linear layers, and its function on rows of tokens
dispatch    tokens to experts and back, on one device or on a mesh, as one custom gradient
grouped     experts applied in blocks to the rows that were routed to them, on one device
exchange    tokens sent to the devices that hold their experts, and results sent back
decode      experts held as separate arrays, for decoding on one device
"""
