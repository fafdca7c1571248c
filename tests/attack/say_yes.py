"""`python say_yes.py PROGRAM ARGV`: the program, with a user who answers every prompt by yes."""

import io
import runpy
import sys

sys.stdin = io.StringIO("y\n" * 99)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
