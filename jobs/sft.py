"""`altiplano sft` as a Ray job: python jobs/sft.py CONFIG [section.key=value ...]."""

from _start import start

if __name__ == "__main__":
    start("sft")
