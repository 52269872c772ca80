"""Running any module over its training set without leaving a trace."""
