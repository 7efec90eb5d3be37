"""A penalty on max / rms of every token's stream."""

penalty = "magnitude"
penalty_weight = 0.01
