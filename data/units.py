"""Numbers as people write them: `100M` tokens, `50GB` of disk."""

from .errors import SettingsError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def parse_count(text: str | int, setting: str = "store.tokens") -> int:
    """`100M` as a number."""
    digits = str(text).strip().upper().replace("_", "")
    unit = digits[-1:] if digits[-1:] in _UNITS else ""
    try:
        return round(float(digits.removesuffix(unit)) * _UNITS[unit])
    except ValueError:
        raise SettingsError(f"{setting}={text} is no number; it takes one such as 5000, 200K, 100M or 1B") from None


def parse_bytes(text: str | int, setting: str = "store.budget") -> int:
    """`50GB` as a number of bytes."""
    digits = str(text).strip().upper().removesuffix("B")
    try:
        return parse_count(digits, setting)
    except SettingsError:
        raise SettingsError(f"{setting}={text} is no size; it takes one such as 500MB or 50GB") from None


def format_bytes(size: float) -> str:
    """A size with three figures: `1.25 GB`."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"
