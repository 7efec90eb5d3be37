"""norm(x + f(x)) (Vaswani et al. 2017)."""

norm_place = "post"
