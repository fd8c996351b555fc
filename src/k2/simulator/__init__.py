"""The simulator: speaks the exchanges' own protocols on loopback."""
