"""The method: pairs, tokenization, log-probabilities, loss, trainers, rewards, generation, statistics, plots.

Imports no Dagster, and runs where torch, transformers and peft are; trl, datasets and duckdb are imported where used.
"""
