"""The losses, and the trainings that minimise them."""
