"""Recipes: one file a job; `recipe()` returns a complete, named Job. Shipped as nemo_minitron.recipes."""
