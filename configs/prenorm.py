"""The baseline: GPT-2's layout, x + f(norm(x)), with every default."""
