"""Frozen models: teachers, captioners, and the one door to open_clip."""
