"""The datasets, a file for each: what it is, where its files are found, and how they are read."""
