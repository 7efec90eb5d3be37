"""ReLU in the FFN."""

activation = "relu"
