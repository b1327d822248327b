"""Training that leaves a thief little, a file each."""
