"""Kills the process that imports it, as LLVM kills one that it cannot serve."""

import os
import sys

print("something like LLVM ERROR", file=sys.stderr, flush=True)
os.abort()
