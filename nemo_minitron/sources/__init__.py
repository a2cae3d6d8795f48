"""Where tensors come from: Hugging Face folders by streams, checkpoints by chunks, all under canonical names."""
