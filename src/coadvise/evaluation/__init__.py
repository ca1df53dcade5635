"""Evaluation: scores of answers, what they are scored on, and what follows from them."""
