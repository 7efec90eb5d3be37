"""All matrices start alike: no 1/sqrt(2L) on what writes to the stream."""

init_scale = "one"
