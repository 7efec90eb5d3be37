"""Unembedding apart from the embedding."""

tie = False
