"""Execution of a plan that can be killed and resumed."""
