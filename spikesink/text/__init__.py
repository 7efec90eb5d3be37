"""Text and token ids: tokenizers, token files, the sequences that a model is observed on."""
