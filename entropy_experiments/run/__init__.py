"""What any long work needs: processes of one launch, durable writing, the end of a launch, self-checks.

Imports rl_training and entropy_core alone.
"""
