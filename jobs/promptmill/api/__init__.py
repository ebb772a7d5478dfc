"""The REST API and the live page: the same queue, the same ledger, over HTTP."""
