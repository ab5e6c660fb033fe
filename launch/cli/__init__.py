"""The command `crosslace`: which verb, its help, and what is said and left behind when it fails."""

from . import main as main
