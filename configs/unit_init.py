"""The init of Sun et al. 2026: embeddings N(0, 1), an untied head N(0, 1/d), no 1/sqrt(2L)."""

embedding_init = "unit"
tie = False
init_scale = "one"
