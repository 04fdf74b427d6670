"""The byte path beside others: `make bench`. docs/benchmarks.md says what is measured and how."""
