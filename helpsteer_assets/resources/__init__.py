"""Where results are kept: the artifact store and the published DuckDB warehouse. Imports no Dagster."""
