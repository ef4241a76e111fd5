"""Methods side by side: the same model, rows and budget, every run in a process of its own."""
