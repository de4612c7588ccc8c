"""The front door: lpcompile(model, policy)."""
