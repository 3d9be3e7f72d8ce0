"""The commands of `helpsteer`."""
