"""Conversations: chat templates, their trained spans, their tokens."""
