"""Requests in, text out. Prefill, decoding and the state of requests know no command line."""
