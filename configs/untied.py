"""Separate matrices for embedding and unembedding."""

tie = False
