"""The peers: how they are installed, and the scripts that run in their environments."""
