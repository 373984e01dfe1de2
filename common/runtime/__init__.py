"""The operating system: files, locks, processes, terminal output, logs, metrics over HTTP."""
