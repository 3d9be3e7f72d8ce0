"""MODPO on HelpSteer as Dagster software-defined assets."""
