"""Where submitting to Slurm, requeueing and watching go: imports pipeline/ only."""
