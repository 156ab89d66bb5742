"""Experiments: the project from data to a table of results. Run them with `python -m pipelines NAME`."""
