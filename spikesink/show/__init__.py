"""Findings as text, figures and pages. Reads findings, never a model."""
