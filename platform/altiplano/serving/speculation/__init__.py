"""Speculative decoding with a draft that may be a replica of its own."""
