"""The engine: one interface, and vLLM behind it. Knows no HTTP."""
