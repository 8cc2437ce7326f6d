"""Development benchmarks and generators that users do not run; not part of the wheel."""
