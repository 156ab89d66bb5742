"""Whole journeys: one recipe a file, whose docstring says command, machine, time and what to expect."""
