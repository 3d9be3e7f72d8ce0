"""The experiment: one YAML file that says everything that determines a result."""
