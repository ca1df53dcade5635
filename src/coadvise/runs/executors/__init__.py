"""Who trains several networks: processes of this machine, a Ray cluster or SLURM."""
