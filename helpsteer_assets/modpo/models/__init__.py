"""Loading models, their adapters and their tokenizers."""
