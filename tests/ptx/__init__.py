"""A machine that executes on a CPU the PTX that Triton compiles for a GPU."""
