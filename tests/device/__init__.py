"""What only a GPU can show: `run.sh STAGE` runs it in stages, and every stage runs on a CPU too, with `--tiny`."""
