"""What a measured process used: its peak of memory, and the bytes it wrote."""

from pathlib import Path


def memory_peak() -> int:
    """Bytes of the most physical memory that this process ever had (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("this system's /proc/self/status has no VmHWM")


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
