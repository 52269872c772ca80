"""What the program does: each task is a function that takes the composed config, in a module of the same name."""

TASKS = ("census", "dashboard", "evaluate", "interpolators", "report", "scan", "slice", "train")
