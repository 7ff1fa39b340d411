"""Which source tensor becomes which parameter: data, not code.

clip      CLIP vision models; also the encoder of CuMo, with experts
whisper   Whisper's encoder, and its text decoder as a connector
beats     the BEATs encoder, and BLIP-2's Q-Former as a connector
llama     dense decoders: LLaMA, Vicuna, Mistral; the shared part of all decoders
mixtral   Mixtral: the decoder of `llama` with experts in every layer
unimoe    Uni-MoE with 4 and 8 experts: decoder, projectors, adapters, routers, rounding
cumo      CuMo: its settings, and CLIP and connector under CuMo's prefixes

Each file turns an original's config.json into settings of this package (`…_config`), lists the
copies (`copies`, `…_copies`) and the source tensors that may stay unused (`EXCUSES`). Files with
`to_json` or `to_cfg` also make the config.json of an export. The files import config,
`convert.entry`, `convert.reader`, `convert.source_names` and, for the places of layers,
`nn.stack` and `connectors.query`.
"""
