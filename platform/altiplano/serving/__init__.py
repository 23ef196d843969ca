"""Serving: what may be served, the engine, the service's lifecycle and what it counts."""
