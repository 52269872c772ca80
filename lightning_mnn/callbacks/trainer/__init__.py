"""What the program itself adds to a Trainer."""
