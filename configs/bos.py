"""Every training window starts with BOS."""

bos = True
