"""`python -m unimoe_jax.train`: run the stages of a run file. Imports evaluate, report, stages.

__main__         the command line and its exit codes
run              all stages in order
preflight        everything that can be wrong and costs nothing to find
dry_run          what a run would do, without compiling anything
context          what the stages of a run share
stage_start      data, tables and parameters of a stage, or its newest checkpoint
stage_programs   everything that a stage will run, compiled before its first step
loop             the loop of one stage: step, log, save, score
stage_log        metrics collected into records
summary          the summary of a stage
finish           what a finished stage and a finished run leave behind
run_folder       one run writes a directory at a time, and only with its own settings
stop             stop after the current step when a signal comes
"""
