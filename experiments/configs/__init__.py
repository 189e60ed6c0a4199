"""Recipes: one file per run that is worth repeating."""
