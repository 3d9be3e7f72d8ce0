"""Makers of this project's own files: references in docs/, the embedded model, SmolLM2."""
