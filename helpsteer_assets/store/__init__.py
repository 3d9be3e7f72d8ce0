"""Where results are kept: one home with its artifacts, tables and locks. Imports no Dagster."""
