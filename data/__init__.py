"""Datasets: the loader, the writer, and a folder per dataset with its prepare.py."""
