"""Recipes, one file for each job: `recipe()` returns a complete, named Job. They ship as nemo_minitron.recipes."""
