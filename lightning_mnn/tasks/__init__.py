"""What the program does: one module a task, with a function of the module's name that takes the composed config."""
