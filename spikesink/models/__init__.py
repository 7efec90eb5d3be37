"""What a model must offer to be observed, and how to open one: ours, nanoGPT's, transformers'."""
