"""The exchange: bids, asks, market rates, surge, quotes, order book and history. Pure; the rules are in specs/exchange.md.

Amounts are integer micro-credits, times Unix milliseconds, both arguments. What is stored is stored by others (coordinator/books).
"""
