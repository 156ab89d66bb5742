"""Recipes, one file each: what a store shall hold, how a student learns from it. Read by reinforce/recipes.py."""
