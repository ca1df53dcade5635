"""Evaluation: scores of networks, the images they are scored on, and the verdict."""
