"""``python -m fedscan`` is ``fedscan``."""

from fedscan.cli import main

if __name__ == "__main__":
    main()
