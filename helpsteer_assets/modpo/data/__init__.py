"""From rated responses to pairs."""
