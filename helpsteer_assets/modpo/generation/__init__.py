"""The policies' responses, and the policies' distance from the SFT model."""
