"""A recipe's value, a file a group of settings: plain frozen dataclasses that say what is illegal."""
