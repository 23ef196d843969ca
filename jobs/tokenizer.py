"""The tokenizer stage as a Ray job: python jobs/tokenizer.py CONFIG [section.key=value ...]."""

from _start import start

if __name__ == "__main__":
    start("run", "--from", "tokenizer", "--until", "tokenizer")
