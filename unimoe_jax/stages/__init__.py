"""A stage made ready to train or to be scored. Imports models, checkpoints and everything below.

data             its pipelines: training batches and held-out batches
losses, optim    cross-entropy and router losses; AdamW with a multiplier per parameter
train_step       the jitted step that trains
score_step       the jitted step that scores a batch by exact match
stage            its models, parameter table, shardings and optimizer
initial_params   its parameters at the start, read from sources or drawn at random
final_params     the parameters that it leaves behind
programs         both steps, lowered for compilation
upcycle_check    the comparison of an upcycled model with the dense one at step 0
"""
