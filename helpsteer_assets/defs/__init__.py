"""Dagster: assets, checks, jobs, partitions and sensors, made from the graph in `assets/`."""
