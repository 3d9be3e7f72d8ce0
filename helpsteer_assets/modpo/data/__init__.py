"""Ratings, and the preference pairs made from them."""
