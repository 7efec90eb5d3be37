"""Norms without a learned gain."""

norm_gain = False
