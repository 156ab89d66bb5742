"""Reads a store into a student. Not built yet."""
