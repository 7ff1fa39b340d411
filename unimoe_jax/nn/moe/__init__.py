"""The sparse mixture-of-experts layer. Imports nn.linear, config and parallel.

layer             the module: router, experts, dispatch and statistics together
router            pure functions: the experts of a token, their weights, router losses
experts           the forms of an expert: its linear layers, and its function on rows of tokens
dispatch          tokens to experts and back, on one device or a mesh, as one custom gradient
mesh_layout       how one call of dispatch is laid out on the mesh
grouped           experts applied in blocks to the rows routed to them, on one device
exchange          tokens sent to the devices that hold their experts, and results sent back
exchange_rounds   the rounds of an exchange: buffers of a fixed size, or of the size needed
decode            experts held as separate arrays, for decoding on one device
"""
