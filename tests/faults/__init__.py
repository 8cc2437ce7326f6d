"""Faults of disks, kills and signals injected into real runs, and damage to what they wrote."""
