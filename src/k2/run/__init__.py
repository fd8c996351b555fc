"""The processes: the only code that knows two stages at once."""
