"""fedscan: hospitals train one imaging model together while their scans stay home."""

__version__ = "0.1.0"
