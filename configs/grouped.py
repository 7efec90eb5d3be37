"""Two heads of keys and values, shared by groups of query heads (Ainslie et al. 2023)."""

n_kv_head = 2
