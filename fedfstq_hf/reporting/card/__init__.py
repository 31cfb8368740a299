"""Model cards: of a federation while it goes on, and of a compressed adapter."""
