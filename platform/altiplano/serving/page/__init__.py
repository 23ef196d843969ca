"""The chat page: a browser's way to the service, by the same HTTP API as everyone's."""
