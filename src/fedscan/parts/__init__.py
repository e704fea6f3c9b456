"""What averaging is made of. Each module is one part of a round; ``adaptive`` is a rule for ``weigh``."""
