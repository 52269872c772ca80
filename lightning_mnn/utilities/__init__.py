"""What any part of the package may use."""
