"""`altiplano serve` as a Ray job: python jobs/serve.py CONFIG [section.key=value ...]."""

from _start import start

if __name__ == "__main__":
    start("serve")
