"""Generation: the key-value cache, sampling and the native engine."""
