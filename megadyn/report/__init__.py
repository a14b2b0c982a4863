"""One page a run: what its output folder holds, as a single HTML file."""
