"""The trusted aggregator: rounds, checkpoints and registry.

It must never see raw data or a personal parameter, nor keep an un-noised sum.
"""
