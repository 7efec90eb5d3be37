"""A learned logit per head that takes attention and gives nothing (GPT-OSS)."""

attention = "sink_logit"
