"""Every training window starts with a BOS token."""

bos = True
