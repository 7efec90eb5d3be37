"""Softpick: a rectified softmax over the visible keys, whose rows may sum to less than one (Zuhri et al. 2025)."""

attention = "softpick"
