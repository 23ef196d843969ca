"""Byte-level BPE vocabularies (Llama-3, Qwen): brought in and extended."""
