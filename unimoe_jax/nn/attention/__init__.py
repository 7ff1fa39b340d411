"""Softmax attention. Imports nn.linear and nn.kernels.

attend       the reference: any mask and any bias, in chunks of queries
packed       rows that hold several samples: tiles of keys that no query sees are skipped
decode       one new token per sequence against cached keys and values
multihead    the module that encoders and query connectors use, with its four projections
rope         rotary position embedding
"""
