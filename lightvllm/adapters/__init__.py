"""Other engines on our executors and backends."""
