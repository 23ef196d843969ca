"""Tokens: packed into blocks, stored in shards, read in a seeded order."""
