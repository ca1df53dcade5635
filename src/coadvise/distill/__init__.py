"""The paper's heart: teachers, what they say of a view, and the loss by which a student learns from it."""
