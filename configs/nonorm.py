"""x + f(x), without any norm; it should diverge at the baseline's learning rate."""

norm_place = "none"
