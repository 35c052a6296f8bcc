"""Submitting runs to Slurm, requeueing and watching them: imports pipeline/ only."""
