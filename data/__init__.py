"""Datasets: the loader, the writer, and a folder for each dataset with its prepare.py."""
