"""Models: what `train` trains, one family a file, built from a config alone."""
