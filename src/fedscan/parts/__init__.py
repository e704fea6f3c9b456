"""What averaging is made of. Each module is one part of a round; none imports another."""
