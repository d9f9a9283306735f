"""Recipes: the papers' models, data and settings, for `distopt fit --config recipes/<name>/configs/<file>.yaml`."""
