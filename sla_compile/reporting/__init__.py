"""What was rewritten and why, as data, as text and on a terminal."""
