"""A client: what it agrees to, what it holds between rounds, what it downloads and sends."""
