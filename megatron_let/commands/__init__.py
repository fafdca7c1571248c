"""The tools: a command line each."""
