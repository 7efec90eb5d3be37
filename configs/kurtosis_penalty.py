"""A penalty on the channel kurtosis of the stream."""

penalty = "kurtosis"
