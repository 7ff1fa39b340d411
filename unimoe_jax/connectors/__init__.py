"""States of an encoder in, soft tokens of the decoder's width out. Imports nn, parallel and config.

mlp     linear layers with GELU in between, dense or as experts: for images and videos
query   learned queries that read all states, as Whisper's decoder or a Q-Former: for speech, audio
"""
