"""The frameworks that build and train a model: NeMo 2 (`hosts/nemo`). A host does not know another one."""
