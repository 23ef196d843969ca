"""The flow from sources to a store: parallel tasks per chunk, then choices in corpus order."""
