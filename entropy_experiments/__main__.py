"""`python -m entropy_experiments`, which is also what `accelerate launch -m` runs."""

from entropy_experiments.cli import main

main()
