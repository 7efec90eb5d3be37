"""A penalty on max / rms of every token's stream."""

losses = {"magnitude": 0.01}
