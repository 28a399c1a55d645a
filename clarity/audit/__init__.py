"""An audit directory: planned once, filled shard by shard, committed, resumed, verified and read."""
