"""Process group and collectives of a run."""
