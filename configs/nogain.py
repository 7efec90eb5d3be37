"""Norms without learned gain."""

norm_gain = False
