"""What docs/benchmarks.md quotes, runnable by anyone."""
