"""An FFN of two matrices without an activation function."""

activation = "identity"
