"""The walk of the data: documents, token shards, batches."""
