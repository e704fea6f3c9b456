"""One function per method, one file per family, a card above each, one registry."""
