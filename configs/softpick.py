"""Softpick: rectified softmax, rows may sum to less than one (Zuhri et al. 2025), over visible keys alone."""

attention = "softpick"
