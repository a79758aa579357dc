"""The books: what the Coordinator must not forget. Accounts and keys, the ledger, jobs, receipts, the market's history."""
