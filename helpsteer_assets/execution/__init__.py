"""How steps run: on this machine or on a Ray cluster, and what happens to runs whose process ends."""
