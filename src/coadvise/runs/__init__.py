"""Runs: everything that one `fit` leaves in its directory, and what is done with it afterwards."""
