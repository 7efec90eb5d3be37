"""Keys and values shared by groups of heads, two in all (Ainslie et al. 2023)."""

n_kv_head = 2
