"""The HTTP side: OpenAI routes, keys, limits, text in and out. Knows no engine."""
