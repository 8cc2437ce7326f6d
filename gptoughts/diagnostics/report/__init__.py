"""Reports of runs: one HTML file for a browser, the same as text, and what differs between runs."""
