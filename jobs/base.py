"""The base stage as a Ray job: python jobs/base.py CONFIG [section.key=value ...]."""

from _start import start

if __name__ == "__main__":
    start("run", "--from", "base", "--until", "base")
