"""Co-advising: teachers, their logits for a view, and the loss by which a student learns from them."""
