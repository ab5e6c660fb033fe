"""`python -m crosslace.launch VERB` is the same as `crosslace VERB`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main.main())
