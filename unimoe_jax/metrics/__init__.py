"""Records that a run writes while it trains, and their evaluation. Imports config and runtime.

records         metrics.jsonl and TensorBoard: written, read back, cut when a stage resumes
progress        the progress line on a terminal or in a log
series          records -> arrays over steps, for figures and reports
router_trends   the routers' losses and loads of a stage, and a verdict on whether they balanced
"""
