"""Casts with identity and state."""
