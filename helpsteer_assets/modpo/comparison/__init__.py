"""How policies differ from SFT: intervals, differences, fronts and plots."""
