"""The front door: command line, simulation and baselines; the only place that sees both sides.

It must never hold mathematics that a deployment also needs.
"""
