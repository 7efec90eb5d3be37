"""An auxiliary loss on the channel kurtosis of the stream."""

losses = {"kurtosis": 1e-3}
