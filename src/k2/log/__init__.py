"""The durable log: every frame, as received, before anything else happens to it."""
