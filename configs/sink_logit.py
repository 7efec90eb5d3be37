"""A learned logit per head that takes attention and adds no value (GPT-OSS)."""

attention = "sink_logit"
