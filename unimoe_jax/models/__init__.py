"""The whole network. Imports encoders, connectors, params, nn, parallel, config and data/batch.py.

token_stream        embeddings of text and soft tokens of media in one stream
decoder             the decoder in training: a stream -> hidden states
branches            vision, speech and audio: a batch's pool of media -> soft tokens
unimoe              the model: branches, stream, decoder and head -> logits or loss
inference_decoder   the decoder in generation: prompts at once, then one token per sequence
declare             a small batch that lets every parameter be declared without computing it
"""
