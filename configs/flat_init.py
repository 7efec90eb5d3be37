"""All matrices start at the same scale, without 1/sqrt(2L) for those that write to the stream."""

init_scale = "one"
