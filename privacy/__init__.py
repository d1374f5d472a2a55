"""Mechanism, accounting, participation filters, ledger and report.

It must never know Flower, raw data or a personal parameter.
"""
