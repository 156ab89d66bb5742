"""Recipes, one file each: what a store holds, how a student learns from it. They are read by reinforce/recipes.py."""
