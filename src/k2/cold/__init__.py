"""The cold tier: exactly-once history in Iceberg."""
