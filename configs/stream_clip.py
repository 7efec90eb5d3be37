"""The residual stream clamped to +-20 after every sub-layer."""

stream_clip = 20.0
