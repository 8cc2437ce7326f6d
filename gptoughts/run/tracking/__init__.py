"""Run folder and sinks: where metrics and plots of a run go."""
