"""Questions: one view over cold, hot and the memory tail."""
