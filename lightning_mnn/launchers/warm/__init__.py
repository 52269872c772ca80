"""A server process that has imported a program and forks a sweep's jobs, which then start in a fraction of a second."""
