"""How fast and how large: measured, printed as tables, never a test's pass or fail."""
