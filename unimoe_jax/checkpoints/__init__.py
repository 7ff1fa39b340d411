"""What is stored on disk, and where a parameter starts.

Imports params, parallel, metrics, runtime and config.

layout      the names inside a run directory
locate      what a PATH that a user gives stands for
checksums   seal a finished folder, and verify it before anything is read
manifest    manifest.json of a checkpoint, and the model settings beside it
steps       the training state of a stage, saved asynchronously every few steps
final       what a finished stage leaves behind
sources     checkpoints and earlier stages of which any part of a parameter can be read
origins     the rules of `init`: which source each parameter starts from
"""
