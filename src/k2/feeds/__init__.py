"""Exchanges: what they send and how to stay connected to them."""
