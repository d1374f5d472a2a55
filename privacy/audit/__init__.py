"""Verification of ledgers and attacks on the mechanism; reads files, needs no Flower and no data."""
