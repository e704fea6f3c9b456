"""Who keeps the promise of an engine: carries letters to sites, and answers back."""
