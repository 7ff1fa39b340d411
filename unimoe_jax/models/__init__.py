"""The decoder, the token stream and the whole multimodal model."""
