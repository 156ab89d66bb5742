"""Evaluation: sets of images, and the metrics of a student on them."""
