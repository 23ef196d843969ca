"""placeholder"""


def require_harmless(guided: dict[str, object]) -> None:
    """x"""
