"""One run from start to end: set-up, pre-flight checks, evidence, callbacks, resume, signals, failures."""
