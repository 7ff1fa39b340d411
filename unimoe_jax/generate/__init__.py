"""`python -m unimoe_jax.generate`: ask a trained or converted model.

Imports models, checkpoints, params, nn, data, parallel, config and runtime.

__main__           the command line and its exit codes
errors             `GenerationError`: one line for the user
request            `Media`, `Message`, `Request` and `Answer`, and requests from JSON
prompt             a request -> token ids and placeholders, as the conversation template writes it
media_encoder      media files -> soft tokens, each file encoded once and remembered
engine/            token ids and soft tokens in, token ids out; many prompts side by side
model              `Model`: requests -> answers, all at once or piece by piece
found              a path -> settings, tokenizer and template of the checkpoint there
generation_config  generation_config.json -> end tokens and default settings
loader             a path -> a `Model` on the devices
routing            the experts that an answer used, as a table and as JSON
chat               a conversation in a terminal
question_files     a file of questions -> a file of answers, resumable
"""
