"""Holding entropy: the target and its schedule, what is known of the level, and the coefficient of the bonus that each step gets.

Knows no trainer; rl_training.integrations.entropy_controller puts it into one.
"""
