"""The graph: one function per asset, in the order in which they are made."""
