"""The settings of a recipe, one file for each group: plain frozen dataclasses that refuse what is not legal."""
