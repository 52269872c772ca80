"""What ActivationPatternRecorder delegates to: vital signs of the units, and when patterns and weights settle."""
