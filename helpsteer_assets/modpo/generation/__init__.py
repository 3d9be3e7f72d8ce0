"""How policies answer, and how far they are from the SFT model."""
