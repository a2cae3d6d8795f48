"""Where tensors come from: Hugging Face folders by streams, NeMo checkpoints by chunks, all under canonical names."""
