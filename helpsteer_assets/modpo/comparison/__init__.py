"""The comparison of policies: intervals, differences, fronts and plots."""
