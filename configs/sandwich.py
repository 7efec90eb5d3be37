"""x + norm(f(norm(x))) (CogView, Gemma 2)."""

norm_place = "sandwich"
