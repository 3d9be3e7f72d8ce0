"""What policies gain and lose: intervals, differences, fronts and plots."""
