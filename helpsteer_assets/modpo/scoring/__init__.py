"""Log-probabilities of responses, and ratings of them."""
