"""An audit directory: planned once, filled shard by shard, committed, resumed, verified and read.

    plan.json                              what is asked for, and the table of shards
    codes/shard-00000.parquet              one row for each image
    counterfactuals/shard-00000.parquet    one row for each (image, target)
    traces/shard-00000.parquet             one row for each (image, target, step), where asked for
    model/                                 a copy of the model directory
    summary.json, _SUCCESS                 written last, when every shard is committed
    _commits/shard-00000.json              names, checksums, sizes and rows of a shard's files: the shard exists with it
    _failures/shard-00000.json             why a shard is missing
    _tmp/RUN/                              scratch directory of the current run: attempts and temporary files
    _lock                                  who is at work

A data file gets its name only when it is complete, and its shard's commit record follows, so readers trust whatever a
commit names. A shard's files have fixed names and the same bytes whoever writes them, so writing a shard twice is
harmless. Every file of a run is renamed out of its scratch directory, and a run begins by removing earlier scratch
directories, so a worker that outlives its driver cannot publish anything. (Object stores have no rename: there a
worker checks for its scratch directory first, and a write in flight lands with the same bytes.)
"""
