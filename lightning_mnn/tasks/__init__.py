"""What the program does: each task is a module's function of the module's name, which takes the composed config."""

TASKS = ("census", "dashboard", "report", "scan", "train")
