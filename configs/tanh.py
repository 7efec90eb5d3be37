"""tanh in the FFN."""

activation = "tanh"
