"""Batches: which samples a step sees, and where they are read from."""
