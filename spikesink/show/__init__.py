"""Turns findings into text, figures and pages. Nothing here reads a model."""
