"""SKC Golf: train, export and score one language model that fits in 16,000,000 bytes."""
