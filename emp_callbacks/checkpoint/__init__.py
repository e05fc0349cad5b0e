"""State as plain data, portable mask files, and reading the weights of other people's files."""
