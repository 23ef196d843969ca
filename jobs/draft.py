"""`altiplano draft` as a Ray job: python jobs/draft.py CONFIG [section.key=value ...]."""

from _start import start

if __name__ == "__main__":
    start("draft")
