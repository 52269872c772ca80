"""Running any module over its training set without side effects on its training."""
