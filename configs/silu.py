"""SiLU in the FFN."""

activation = "silu"
