"""Speed, side by side with the reference procedure: `python -m benchmarks`.

Contenders take turns in one process, on the same pairs, model and optimizer, and are compared by ratios of process CPU
time (on a GPU: device time). Seconds depend on the machine and on who else uses it; ratios hardly do.
"""
