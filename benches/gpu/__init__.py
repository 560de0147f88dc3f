"""What needs a GPU: `make bench` writes part gpu of RESULTS.md, `scripts/gpu-check.sh` runs the modules one by one.

Nothing of it has run on a GPU yet; on the CPU it is rehearsed with tiny sizes.
"""
