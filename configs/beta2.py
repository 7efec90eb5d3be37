"""Adam with beta2 0.999."""

beta2 = 0.999
