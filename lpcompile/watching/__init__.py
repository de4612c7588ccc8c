"""Watching: what precision does to a model as it trains, measured on the tensors that flow; `lpcompile.telemetry`."""
