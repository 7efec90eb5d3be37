"""Norms on the sub-layers' output only (OLMo 2)."""

norm_place = "output"
