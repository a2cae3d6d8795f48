"""NeMo 2 and Lightning: building, filling, callbacks, training, data module, the stages as NeMo runs them."""
