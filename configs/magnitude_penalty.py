"""An auxiliary loss on max / rms of each token's stream."""

losses = {"magnitude": 0.01}
