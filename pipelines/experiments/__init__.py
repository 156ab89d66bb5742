"""Experiments: commands of the project one after the other, up to a table."""
