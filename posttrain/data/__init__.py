"""Rows of post-training: conversations, pairs and prompts."""
