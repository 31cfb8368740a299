"""A whole federation on one machine: who holds which data, who takes part when, and what the links cost.

Only the clock and the link are simulated; sessions, codec and coordinator are those of a real federation.
"""
