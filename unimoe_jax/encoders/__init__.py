"""Images and sounds as arrays in, a sequence of hidden states out. Imports nn, parallel and config.

clip      CLIP's vision transformer, dense or with experts: images -> states of their patches
scales    one image as tiles at several scales, and the tiles' states merged into one grid again
whisper   Whisper's audio encoder: log-mel chunks of speech -> states
beats     BEATs: filter-bank chunks of any sound -> states of their patches
"""
