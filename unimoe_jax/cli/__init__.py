"""The console command `unimoe`, a short way to call every verb. May import all other packages.

__main__   `unimoe VERB …` does the same as `python -m unimoe_jax.VERB …`; `unimoe --help` lists the
           verbs without importing any of them
"""
