"""What the commands of `helpsteer` do."""
