"""The hot tier: recent rows and candles."""
