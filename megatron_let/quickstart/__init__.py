"""A teacher, a plain and a guided student on a laptop: `make quickstart`."""
