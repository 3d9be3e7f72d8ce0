"""The attributes that HelpSteer rates."""

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""HelpSteer's rating columns: integers 0 to 4, higher is better."""

OVERALL = "overall"
"""The sum of the five attributes (0 to 20), usable wherever an attribute is."""
