"""x + f(x), no norm anywhere; expected to diverge at the baseline's learning rate."""

norm_place = "none"
