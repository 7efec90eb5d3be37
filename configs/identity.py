"""An FFN of two matrices without a non-linearity."""

activation = "identity"
